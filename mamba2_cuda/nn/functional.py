"""The operators that the modules are made of, in one place."""

from mamba2_cuda.ops import (
    add_norm,
    add_norm_,
    causal_conv1d,
    causal_conv1d_step,
    gated_rmsnorm,
    linear_rows,
    linear_rows_at_once,
    norm_linear,
    norm_linear_add_norm_,
    ssd_scan,
    ssd_step,
)

from .conv_scan_norm import conv_scan_norm, mixer

__all__ = [
    "add_norm",
    "add_norm_",
    "causal_conv1d",
    "causal_conv1d_step",
    "conv_scan_norm",
    "gated_rmsnorm",
    "linear_rows",
    "linear_rows_at_once",
    "mixer",
    "norm_linear",
    "norm_linear_add_norm_",
    "ssd_scan",
    "ssd_step",
]
