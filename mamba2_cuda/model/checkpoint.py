"""Models on disk: a folder of config.json and weights, in two formats, each in either container.

format        state-spaces (mamba2-130m ... 2.7b) or huggingface (transformers' Mamba2)
container     safetensors, or a pickle that is read with weights_only: no code in it is run
shards        either container may be split, with an index that says what lies where
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from .config import ModelConfig
from .huggingface import (
    config_from_huggingface,
    config_to_huggingface,
    is_huggingface,
    names_from_huggingface,
    names_to_huggingface,
)
from .language_model import Mamba2LMHeadModel

FORMATS = ("state-spaces", "huggingface")
CONTAINERS = {"safetensors": "model.safetensors", "pickle": "pytorch_model.bin"}
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"


class CheckpointError(RuntimeError):
    """A checkpoint that is absent, damaged, or not of this model."""


@dataclass
class Report:
    """How the weights of a file and those of a model differ; empty when they match."""

    missing: list = field(default_factory=list)
    unexpected: list = field(default_factory=list)
    wrong: list = field(default_factory=list)

    def __bool__(self):
        return bool(self.missing or self.unexpected or self.wrong)

    def __str__(self):
        lines = [f"missing: {name}" for name in self.missing]
        lines += [f"unexpected: {name}" for name in self.unexpected]
        return "\n".join(lines + self.wrong)


def load_model(folder, *, device=None, dtype=None, vocab_size=None):
    """The Mamba2LMHeadModel of a folder, in its weights' dtype if none is given.

    vocab_size: how many rows of the vocabulary are tokens, where config.json counts the padded ones
    as well. Raises CheckpointError with every key that is missing, unexpected or of a wrong shape.
    """
    folder = Path(folder)
    config = read_config(folder, vocab_size)
    weights = names_from_huggingface(read_weights(folder))
    return build(config, weights, folder, device, dtype)


def build(config, weights, where, device=None, dtype=None):
    """A model of these weights, by name, which are changed by padding and tying alone."""
    model = Mamba2LMHeadModel(config, device="meta")
    weights = pad_vocabulary(tie(dict(weights), config), config)
    if report := compare(model, weights):
        raise CheckpointError(f"{where}: the weights are not those of config.json\n{report}")
    moved = {name: w.to(device=device, dtype=dtype) for name, w in weights.items()}
    model.load_state_dict(moved, assign=True)
    model.tie_weights()
    return model


def read_config(folder, vocab_size=None):
    given = read_json(folder / "config.json")
    try:
        if is_huggingface(given):
            config = config_from_huggingface(given)
        else:
            config = ModelConfig.from_dict(given)
        return config if vocab_size is None else with_vocabulary(config, vocab_size)
    except (ValueError, TypeError, KeyError) as cause:
        raise CheckpointError(f"{folder / 'config.json'}: {cause}") from cause


def with_vocabulary(config, vocab_size):
    """The config whose padded vocabulary is the same and of which vocab_size rows are tokens."""
    padded = config.padded_vocab_size
    if not 0 < vocab_size <= padded:
        raise ValueError(f"vocab_size must be in 1..{padded}, got {vocab_size}")
    return ModelConfig(
        **{**vars(config), "vocab_size": vocab_size, "pad_vocab_size_multiple": padded}
    )


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"{path}: {cause}") from cause


def read_weights(folder):
    """Every tensor of the folder by name, on the CPU."""
    for name in CONTAINERS.values():
        if (folder / name).exists():
            return read_container(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = sorted(set(read_json(index)["weight_map"].values()))
            outside = [shard for shard in shards if Path(shard).name != shard]
            if outside:
                raise CheckpointError(f"{index}: shards outside the folder: {outside}")
            parts = [read_container(folder / shard) for shard in shards]
            return {name: weight for part in parts for name, weight in part.items()}
    raise CheckpointError(f"{folder}: no {' and no '.join(CONTAINERS.values())}")


def read_container(path):
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:  # a damaged file raises whatever its reader stumbles on
        raise CheckpointError(f"{path}: cannot be read: {cause}") from cause
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise CheckpointError(f"{path}: is not a table of tensors by name")
    return weights


def tie(weights, config):
    """A tied head may be left out of a file; if it is there, it must be the embedding."""
    if config.tie_embeddings and EMBEDDING in weights:
        head = weights.setdefault(HEAD, weights[EMBEDDING])
        if not torch.equal(head, weights[EMBEDDING]):
            raise CheckpointError(f"{HEAD} differs from {EMBEDDING}, but config.json ties them")
    return weights


def pad_vocabulary(weights, config):
    """Rows of zeros where a file holds the tokens' rows without the padding."""
    more = config.padded_vocab_size - config.vocab_size
    for name in (EMBEDDING, HEAD):
        if more and name in weights and weights[name].size(0) == config.vocab_size:
            weights[name] = F.pad(weights[name], (0, 0, 0, more))
    return weights


def compare(model, weights):
    wanted = model.state_dict()
    wrong = [
        f"shape of {name}: must be {tuple(wanted[name].shape)}, is {tuple(weight.shape)}"
        for name, weight in weights.items()
        if name in wanted and wanted[name].shape != weight.shape
    ]
    return Report(sorted(wanted.keys() - weights), sorted(weights.keys() - wanted), wrong)


def save_model(model, folder, format="state-spaces", container="safetensors"):
    """Writes config.json and the weights; a file is there whole or not at all.

    Weights of another container, which a reader might take for this model's, are removed. A tied
    head is written once, but for state-spaces pickles, whose readers look for both names.
    """
    if format not in FORMATS or container not in CONTAINERS:
        raise ValueError(f"format: one of {FORMATS}, container: one of {tuple(CONTAINERS)}")
    folder, config = Path(folder), model.config
    weights = {name: w.detach().cpu().contiguous() for name, w in model.state_dict().items()}
    if config.tie_embeddings:
        weights[HEAD] = weights[EMBEDDING]
    if config.tie_embeddings and (container, format) != ("pickle", "state-spaces"):
        del weights[HEAD]
    written = config.to_dict()
    if format == "huggingface":
        written, weights = config_to_huggingface(config), names_to_huggingface(weights)
        written["dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)

    def write_weights(path):
        if container == "pickle":
            torch.save(weights, path)
        else:
            from safetensors.torch import save_file

            save_file(weights, path, metadata={"format": "pt"})

    replace(folder / CONTAINERS[container], write_weights)
    text = json.dumps(written, indent=2) + "\n"
    replace(folder / "config.json", lambda path: path.write_text(text))
    for name in CONTAINERS.values():
        (folder / f"{name}.index.json").unlink(missing_ok=True)
        if name != CONTAINERS[container]:
            (folder / name).unlink(missing_ok=True)


def replace(path, write):
    """write(temporary path), then the file takes its name at once, its bytes being on the disk."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
