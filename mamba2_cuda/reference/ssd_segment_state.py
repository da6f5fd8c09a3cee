"""What a segment of tokens does to the state that passes through it."""

import math

import torch
from einops import repeat

from .discretise import log_decay, step_size, working_dtype
from .ssd_scan import apply_to_rows, block


def ssd_segment_state(x, dt, A, B, *, dt_bias=None, dt_softplus=False, dt_limit=(0.0, math.inf)):
    """state = sum_t exp(a_{t+1} + ... + a_l) delta_t x_t B_t^T and log_decay = a_1 + ... + a_l.

    A state S before the segment leaves it as exp(log_decay) S + state. x (b, l, h, p),
    dt (b, l, h), A and dt_bias (h,), B (b, l, g, n) -> state (b, h, p, n), log_decay (b, h), in
    fp64 if x is fp64, else fp32.
    """
    work, h = working_dtype(x), x.size(2)
    x, dt, A, B = (v.to(work) for v in (x, dt, A, B))
    delta = step_size(dt, None if dt_bias is None else dt_bias.to(work), dt_softplus, dt_limit)
    a = log_decay(delta, A)
    B = repeat(B, "b l g n -> b l (g r) n", r=h // B.size(2))
    nothing = x.new_zeros(x.size(0), h, x.size(3), B.size(3))
    _, state = apply_to_rows(block, (x, delta, a, B, torch.zeros_like(B)), nothing)
    return state, a.sum(1)
