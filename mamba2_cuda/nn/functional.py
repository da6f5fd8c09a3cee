"""The operators that the modules are made of, in one place.

ssd_scan is compiled. The convolution, the gated norm and the step are the plain PyTorch ones.
"""

from mamba2_cuda import reference
from mamba2_cuda.ops import ssd_scan
from mamba2_cuda.reference import causal_conv1d, gated_rmsnorm

__all__ = ["causal_conv1d", "causal_conv1d_step", "gated_rmsnorm", "ssd_scan", "ssd_step"]


def causal_conv1d_step(conv_state, x, weight, bias=None, *, silu=True):
    """causal_conv1d of one token x (b, d) after conv_state (b, w - 1, d), which moves on by it."""
    y, after = causal_conv1d(
        x[:, None], weight, bias, silu=silu, initial_states=conv_state, return_final_states=True
    )
    conv_state.copy_(after)
    return y[:, 0]


def ssd_step(state, x, dt, A, B, C, **options):
    """reference.ssd_step, with the state (b, h, p, n) updated in place; returns y (b, h, p)."""
    y, after = reference.ssd_step(state, x, dt, A, B, C, **options)
    state.copy_(after)
    return y
