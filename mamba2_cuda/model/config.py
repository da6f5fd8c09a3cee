"""The shape of a language model, in the keys of the published config.json files."""

import dataclasses
import inspect
from dataclasses import dataclass, field

from mamba2_cuda.nn import Attention, Mamba2

NOT_IN_FILES = {"d_model", "process_group", "device", "dtype"}
MIXER_KEYS = set(inspect.signature(Mamba2).parameters) - NOT_IN_FILES
ATTENTION_KEYS = set(inspect.signature(Attention).parameters) - NOT_IN_FILES
# In published files, with no meaning for the result: how another program computes it.
IGNORED_KEYS = {"layer", "chunk_size", "use_mem_eff_path", "sequence_parallel"}


@dataclass(frozen=True)
class ModelConfig:
    """ssm_cfg and attn_cfg are the keyword arguments of nn.Mamba2 and nn.Attention.

    attn_layer_idx: the layers that are attention. d_intermediate: hidden size of an MLP after each
    mixer (0: none). The embedding has vocab_size rows rounded up to pad_vocab_size_multiple.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_intermediate: int = 0
    ssm_cfg: dict = field(default_factory=dict)
    attn_layer_idx: tuple = ()
    attn_cfg: dict = field(default_factory=dict)
    norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True

    def __post_init__(self):
        least = dict(
            d_model=1, n_layer=0, vocab_size=1, d_intermediate=0, pad_vocab_size_multiple=1
        )
        for name, least_value in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least_value:
                raise ValueError(f"{name} must be an integer from {least_value} on, got {value!r}")
        check_keys("ssm_cfg", self.ssm_cfg, MIXER_KEYS)
        check_keys("attn_cfg", self.attn_cfg, ATTENTION_KEYS)
        outside = [i for i in self.attn_layer_idx if not 0 <= i < self.n_layer]
        if outside:
            raise ValueError(f"attn_layer_idx: no layers {outside} among {self.n_layer}")

    @property
    def padded_vocab_size(self):
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple

    @classmethod
    def from_dict(cls, given):
        """Out of a config.json's content. Raises ValueError on what this model cannot be."""
        check_is_table("config", given)
        given = dict(given)
        missing = sorted({"d_model", "n_layer", "vocab_size"} - set(given))
        if missing:
            raise ValueError(f"config: has no {', '.join(missing)}")
        for name in ("ssm_cfg", "attn_cfg"):
            check_is_table(name, given.get(name) or {})
        ssm_cfg = dict(given.pop("ssm_cfg", None) or {})
        layer = ssm_cfg.get("layer", "Mamba1")
        if layer != "Mamba2":
            raise ValueError(f"ssm_cfg: layer must be 'Mamba2', got {layer!r}")
        if not given.pop("rms_norm", True):
            raise ValueError("rms_norm must be true: LayerNorm is not implemented")
        given.pop("fused_add_norm", None)
        check_keys("config", given, {f.name for f in dataclasses.fields(cls)})
        return cls(
            **{
                **given,
                "ssm_cfg": {k: v for k, v in ssm_cfg.items() if k not in IGNORED_KEYS},
                "attn_layer_idx": tuple(given.get("attn_layer_idx") or ()),
                "attn_cfg": dict(given.get("attn_cfg") or {}),
            }
        )

    def to_dict(self):
        """What from_dict takes; norm_epsilon only where it is not everyone's default."""
        written = dataclasses.asdict(self)
        written["ssm_cfg"] = {"layer": "Mamba2", **self.ssm_cfg}
        written["attn_layer_idx"] = list(self.attn_layer_idx)
        written |= {"rms_norm": True, "fused_add_norm": True}
        if self.norm_epsilon == 1e-5:
            del written["norm_epsilon"]
        return written


def check_is_table(what, given):
    if not isinstance(given, dict):
        raise ValueError(f"{what}: must be a table of values by name, got {given!r}")


def check_keys(what, given, known):
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"{what}: unknown keys {unknown}; known are {sorted(known)}")
