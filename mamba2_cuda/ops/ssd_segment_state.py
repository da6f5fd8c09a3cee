"""ssd_segment_state: what a segment of tokens does to the state passing through it."""

import math

import torch

from .once import once
from .plan import current_plan
from .ssd_scan import autocast

_ops = torch.ops.mamba2_cuda


def ssd_segment_state(x, dt, A, B, *, dt_bias=None, dt_softplus=False, dt_limit=(0.0, math.inf)):
    """The affine map that a segment of l tokens is to the state: S leaves it as

        exp(log_decay) S + state
        state     = sum_t exp(a_{t+1} + ... + a_l) delta_t x_t B_t^T
        log_decay = a_1 + ... + a_l,    a_t = delta_t A,    delta as in ssd_scan

    Maps compose: segments of one sequence may lie on different devices, and only these two tensors
    travel. The final states of ssd_scan are this map applied to its initial states.

    x (b, l, h, p) fp64, fp32, bf16 or fp16; dt (b, l, h), A and dt_bias (h,) of any of these; B
    (b, l, g, n) of x's dtype. Under autocast x and B, and nothing else, are cast.

    Returns state (b, h, p, n) and log_decay (b, h), natural logarithm, fp32 (fp64 when x is).

    Differentiable once in x, dt, A, B and dt_bias.

    Raises RuntimeError when an argument does not fit, naming it, what it must be and what it is;
    when memory runs out; when differentiated twice.

    Source: Dao & Gu 2024 (arXiv 2405.21060), section 6 ("right factors") and 8.2.
    """
    x, B = autocast(x, B)
    return _SsdSegmentState.apply(x, dt, A, B, dt_bias, dt_softplus, *dt_limit, current_plan())


_backward = once("ssd_segment_state", _ops.ssd_segment_state_backward.default)


class _SsdSegmentState(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, dt_bias, dt_softplus, dt_min, dt_max, plan):
        ctx.save_for_backward(x, dt, A, B, dt_bias)
        ctx.options = (dt_softplus, dt_min, dt_max, plan)
        return _ops.ssd_segment_state_forward.default(x, dt, A, B, dt_bias, *ctx.options)

    @staticmethod
    def backward(ctx, d_state, d_log_decay):
        gradients = _backward(d_state, d_log_decay, *ctx.saved_tensors, *ctx.options)
        wanted = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad))
        return (*wanted, *(None,) * 4)
