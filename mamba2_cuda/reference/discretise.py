"""From the raw dt to the step size delta and the log decay a = delta A (paper, section 2.1)."""

import math

import torch
import torch.nn.functional as F


def working_dtype(x):
    """What a computation on x runs in: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def step_size(dt, dt_bias=None, dt_softplus=False, dt_limit=(0.0, math.inf)):
    """delta = clamp(softplus(dt + dt_bias)), per token and head; softplus and bias are options.

    dt (..., h), dt_bias (h,) -> (..., h), in dt's dtype. No gradient passes where the clamp acts.
    """
    v = dt if dt_bias is None else dt + dt_bias
    delta = F.softplus(v) if dt_softplus else v
    return delta.clamp(*dt_limit)


def log_decay(delta, A, seq_idx=None):
    """a_t = delta_t A: the state is multiplied by exp(a_t) at token t.

    delta (b, l, h), A (h,), seq_idx (b, l) -> (b, l, h). Where seq_idx changes the state is
    forgotten: a_t = -inf there, and exp(a_t) = 0.
    """
    a = delta * A
    if seq_idx is not None and seq_idx.size(1) > 1:
        changes = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0), value=False)
        a = a.masked_fill(changes[..., None], -math.inf)
    return a
