"""The Mamba2 format of Hugging Face's transformers: its config.json and names of weights."""

import math

from .config import ModelConfig, check_keys

# Key of config.json -> ours, of the model and of its mixers.
MODEL_KEYS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "vocab_size": "vocab_size",
    "layer_norm_epsilon": "norm_epsilon",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_embeddings",
}
SSM_KEYS = {
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "head_dim": "headdim",
    "n_groups": "ngroups",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
    "time_step_limit": "dt_limit",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
}
# What transformers takes a key to be that its config.json leaves out.
DEFAULTS = dict(
    hidden_size=4096, num_hidden_layers=64, vocab_size=32768, layer_norm_epsilon=1e-5,
    residual_in_fp32=True, tie_word_embeddings=False, state_size=128, conv_kernel=4, expand=2,
    head_dim=64, n_groups=8, use_bias=False, use_conv_bias=True, time_step_limit=(0.0, math.inf),
    time_step_min=1e-3, time_step_max=0.1, time_step_floor=1e-4,
)  # fmt: skip
RENAMED = {"backbone.embeddings.weight": "backbone.embedding.weight"}


def is_huggingface(given):
    return "model_type" in given


def config_from_huggingface(given):
    """ModelConfig of a config.json's content. Raises ValueError when it is no Mamba-2."""
    if given["model_type"] != "mamba2":
        raise ValueError(f"model_type must be 'mamba2', got {given['model_type']!r}")
    if given.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act must be 'silu', got {given['hidden_act']!r}")
    given = {**DEFAULTS, **given}
    heads = int(given["expand"] * given["hidden_size"]) // given["head_dim"]
    if given.get("num_heads", heads) != heads:
        raise ValueError(
            f"num_heads must be expand * hidden_size / head_dim = {heads}, got {given['num_heads']}"
        )
    ssm_cfg = {ours: given[theirs] for theirs, ours in SSM_KEYS.items()}
    ssm_cfg["dt_limit"] = tuple(number(v) for v in ssm_cfg["dt_limit"])
    model = {ours: given[theirs] for theirs, ours in MODEL_KEYS.items()}
    return ModelConfig(**model, ssm_cfg=ssm_cfg, pad_vocab_size_multiple=1)


def number(v):
    """A float of a config.json: infinity may be written as a word, or wrapped."""
    return float(v["__float__"] if isinstance(v, dict) else v)


def config_to_huggingface(config):
    """The config.json of a ModelConfig. Raises ValueError when that format cannot say it."""
    if config.attn_layer_idx or config.d_intermediate:
        raise ValueError("the Hugging Face Mamba2 format has no attention layers and no MLP")
    ssm_cfg = {ours: DEFAULTS[theirs] for theirs, ours in SSM_KEYS.items()} | {"ngroups": 1}
    ssm_cfg |= config.ssm_cfg
    others = {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
    others |= {"norm_eps": config.norm_epsilon, "norm_groups": ssm_cfg["ngroups"]}
    for key, value in others.items():
        if ssm_cfg.pop(key, value) != value:
            raise ValueError(f"the Hugging Face Mamba2 format needs {key} = {value}")
    ssm_cfg.pop("A_init_range", None)  # matters to new models alone
    check_keys("ssm_cfg", ssm_cfg, set(SSM_KEYS.values()))
    written = {theirs: getattr(config, ours) for theirs, ours in MODEL_KEYS.items()}
    written |= {theirs: ssm_cfg[ours] for theirs, ours in SSM_KEYS.items()}
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "hidden_act": "silu",
        **written,
        "vocab_size": config.padded_vocab_size,
        "num_heads": int(ssm_cfg["expand"] * config.d_model) // ssm_cfg["headdim"],
        "time_step_limit": list(ssm_cfg["dt_limit"]),
    }


def names_from_huggingface(weights):
    return {RENAMED.get(name, name): weight for name, weight in weights.items()}


def names_to_huggingface(weights):
    theirs = {ours: theirs for theirs, ours in RENAMED.items()}
    return {theirs.get(name, name): weight for name, weight in weights.items()}
