"""Mamba-1's selective scan: every channel has its own decay of every state entry.

It is the baseline of the associative recall experiment; no kernel of ours computes it.
"""

import torch
import torch.nn.functional as F

from .discretise import step_size, working_dtype


def selective_scan(
    x, dt, A, B, C, *, D=None, z=None, dt_bias=None, dt_softplus=False, form="parallel"
):
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t and y_t = (C_t . h_t + D x_t) silu(z_t).

    x, dt and z (b, l, d), A (d, n), B and C (b, l, n), D and dt_bias (d,) -> y (b, l, d) in x's
    dtype; computed in fp64 if x is fp64, else fp32. form "recurrent": l steps; "parallel": log2(l)
    steps over the whole sequence. Source: Gu & Dao 2023, arXiv 2312.00752, section 3.
    """
    work = working_dtype(x)
    x_, dt, A, B, C = (v.to(work) for v in (x, dt, A, B, C))
    delta = step_size(dt, None if dt_bias is None else dt_bias.to(work), dt_softplus)
    decay = (delta[..., None] * A).exp()  # (b, l, d, n)
    added = (delta * x_)[..., None] * B[:, :, None]
    state = {"recurrent": linear_recurrence, "parallel": parallel_scan}[form](decay, added)
    y = torch.einsum("bldn,bln->bld", state, C)
    if D is not None:
        y = y + D.to(work) * x_
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(x.dtype)


def linear_recurrence(decay, added):
    """h_t = decay_t h_{t-1} + added_t along dim 1, one token after another, from h = 0."""
    return _LinearRecurrence.apply(decay, added)


class _LinearRecurrence(torch.autograd.Function):
    """Backward: g_t = dh_t + decay_{t+1} g_{t+1}, the same recurrence from the end; g_t is the
    gradient of added_t, and g_t h_{t-1} that of decay_t."""

    @staticmethod
    def forward(ctx, decay, added):
        h = added.clone()
        for t in range(1, h.size(1)):
            h[:, t].addcmul_(decay[:, t], h[:, t - 1])
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    def backward(ctx, dh):
        decay, h = ctx.saved_tensors
        g = dh.clone()
        for t in reversed(range(1, g.size(1))):
            g[:, t - 1].addcmul_(decay[:, t], g[:, t])
        before = F.pad(h, (0, 0, 0, 0, 1, 0))[:, :-1]
        return g * before, g


def parallel_scan(decay, added):
    """The same by doubling: after step k each token holds what the last 2^k tokens made of it.

    (d2, a2) after (d1, a1) is the pair (d2 d1, d2 a1 + a2): composition of affine maps.
    """
    span = 1
    while span < added.size(1):
        before = F.pad(added, (0, 0, 0, 0, span, 0))[:, :-span]
        added = decay * before + added
        decay = decay * F.pad(decay, (0, 0, 0, 0, span, 0))[:, :-span]
        span *= 2
    return added
