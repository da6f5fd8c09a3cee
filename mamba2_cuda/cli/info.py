"""Say what a model is made of, or, with no model, what this installation can do.

mamba2 info
mamba2 info out/model
"""

from pathlib import Path

import torch

from mamba2_cuda import __version__, build_info
from mamba2_cuda._load import BuildError
from mamba2_cuda.model import load_model


def add_options(parser):
    parser.add_argument("model", type=Path, nargs="?", help="folder of config.json and weights")


def run(options):
    facts = installation() if options.model is None else describe(options.model)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")


def installation():
    facts = {"mamba2_cuda": __version__, "torch": torch.__version__}
    for i in range(torch.cuda.device_count()):
        facts[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    try:
        return facts | {name.replace("_", " "): value for name, value in build_info().items()}
    except BuildError as problem:
        return facts | {"build": problem}


def describe(folder):
    """Reads the whole checkpoint, so that a damaged or foreign one is refused here as well."""
    model = load_model(folder)
    config, weight = model.config, model.lm_head.weight
    caches = model.allocate_cache(1, 1).layers
    mixers = [layer for layer in caches if hasattr(layer, "ssm")]
    state = sum(layer.ssm.nbytes + layer.conv.nbytes for layer in mixers)
    facts = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "dtype": str(weight.dtype).removeprefix("torch."),
        "layers": f"{config.n_layer} of width {config.d_model}",
        "vocabulary": f"{config.vocab_size:,} in {config.padded_vocab_size:,} rows",
        "head": "the embedding" if config.tie_embeddings else "its own",
    }
    if mixers:
        _, heads, headdim, d_state = mixers[0].ssm.shape
        facts["Mamba-2"] = f"{heads} heads of {headdim}, state {d_state}"
        facts["state of a sequence"] = f"{state / 2**20:.1f} MiB, whatever its length"
    if config.attn_layer_idx:
        facts["attention"] = f"layers {', '.join(map(str, config.attn_layer_idx))}"
    if config.d_intermediate:
        facts["MLP"] = f"{config.d_intermediate} hidden"
    return facts
