"""The operators that the modules are made of, in one place.

ssd_scan and ssd_step are compiled. The convolution and the gated norm are the plain PyTorch ones.
"""

from mamba2_cuda.ops import ssd_scan, ssd_step
from mamba2_cuda.reference import causal_conv1d, gated_rmsnorm

__all__ = ["causal_conv1d", "causal_conv1d_step", "gated_rmsnorm", "ssd_scan", "ssd_step"]


def causal_conv1d_step(conv_state, x, weight, bias=None, *, silu=True):
    """causal_conv1d of one token x (b, d) after conv_state (b, w - 1, d), which moves on by it."""
    y, after = causal_conv1d(
        x[:, None], weight, bias, silu=silu, initial_states=conv_state, return_final_states=True
    )
    conv_state.copy_(after)
    return y[:, 0]
