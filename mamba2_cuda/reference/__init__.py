"""The operators in plain PyTorch: what the kernels are compared with. Needs no compiled module."""

from .attention import (
    linear_attention,
    linear_attention_as_ssd,
    retention,
    retention_as_ssd,
)
from .causal_conv1d import causal_conv1d
from .gated_rmsnorm import gated_rmsnorm
from .selective_scan import selective_scan
from .ssd_scan import ssd_scan
from .ssd_segment_state import ssd_segment_state
from .ssd_step import ssd_step

__all__ = [
    "causal_conv1d",
    "gated_rmsnorm",
    "linear_attention",
    "linear_attention_as_ssd",
    "retention",
    "retention_as_ssd",
    "selective_scan",
    "ssd_scan",
    "ssd_segment_state",
    "ssd_step",
]
