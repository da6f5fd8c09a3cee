"""ssd_step: the scan for the next token, from a state that is carried along."""

import math

import torch

from .plan import current_plan
from .ssd_scan import autocast

_ops = torch.ops.mamba2_cuda


def ssd_step(
    state, x, dt, A, B, C, *, D=None, z=None, dt_bias=None, dt_softplus=False,
    dt_limit=(0.0, math.inf), state_indices=None, out_state_indices=None, early_state=False,
):  # fmt: skip
    """One step of decoding, for one token a sequence or T of them; `state` is updated in place.

        delta_t = clamp(softplus(dt_t + dt_bias) if dt_softplus else dt_t + dt_bias, dt_limit)
        H_t     = exp(delta_t A) H_{t-1} + delta_t x_t B_t^T
        y_t     = (H_t C_t + D x_t) silu(z_t)

    As ssd_scan from the state given to the state left: with tokens one by one, or in groups.

    state              (b, h, p, n) fp64, fp32, bf16 or fp16, contiguous within an entry; with
                       state_indices (slots, h, p, n)
    x, z               (b, h, p) or (b, T, h, p)   fp64, fp32, bf16 or fp16
    dt                 (b, h) or (b, T, h)         any of these dtypes, its own
    A, dt_bias         (h,)                        likewise
    B, C               (b, g, n) or (b, T, g, n)   x's dtype, as z
    D                  (h,), (h, p)                any of these dtypes
    state_indices      (b,) int32: the slot of each entry's state; negative (or no slot): padding,
                       which reads and writes no state and whose y is 0
    out_state_indices  (b,) int32: the slot to leave the new state in, where it is not the same;
                       negative: nowhere. No slot may be written that another entry reads
    early_state        a promise: what was queued just before writes neither `state` nor indices.
                       They are then read while that still runs

    Arithmetic is fp32 (fp64 for fp64); between the tokens of a call the state is not rounded.
    Under autocast x, B, C and z, and nothing else, are cast. One kernel; no host synchronisation.

    Returns y, shaped and typed as x. Not differentiable.

    Raises RuntimeError when an argument does not fit, naming it, what it must be and what it is.

    Source: Dao & Gu 2024 (arXiv 2405.21060), equation 1.
    """
    x, B, C, z = autocast(x, B, C, z)
    return _ops.ssd_step.default(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, *dt_limit, state_indices,
        out_state_indices, current_plan(), early_state,
    )  # fmt: skip
