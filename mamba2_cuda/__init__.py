"""Mamba-2's state space duality (Dao & Gu 2024, arXiv 2405.21060) as CPU and CUDA operators.

    from mamba2_cuda import ssd_scan
    y = ssd_scan(x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=True)

Names are loaded when first used, so that `import mamba2_cuda` needs no build: the compiled
operators come with `ssd_scan` and its kin, `mamba2_cuda._C` with `explain` and `build_info`.
"""

import importlib

from mamba2_cuda._version import __version__

_HOME_OF = {
    "ssd_scan": "ops",
    "ssd_segment_state": "ops",
    "ssd_step": "ops",
    "causal_conv1d": "ops",
    "causal_conv1d_step": "ops",
    "gated_rmsnorm": "ops",
    "batch_invariant": "ops",
    "explain": "_explain",
    "build_info": "_explain",
}
__all__ = ["__version__", *_HOME_OF]


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
