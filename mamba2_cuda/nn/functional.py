"""The operators that the modules are made of, in one place.

All are compiled but the gated norm, which is the plain PyTorch one.
"""

from mamba2_cuda.ops import causal_conv1d, causal_conv1d_step, ssd_scan, ssd_step
from mamba2_cuda.reference import gated_rmsnorm

__all__ = ["causal_conv1d", "causal_conv1d_step", "gated_rmsnorm", "ssd_scan", "ssd_step"]
