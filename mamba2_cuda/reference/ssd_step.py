"""Decoding: the recurrence for the next token or tokens, from a state that is carried along."""

import math

import torch

from .ssd_scan import ssd_scan


def ssd_step(
    state,
    x,
    dt,
    A,
    B,
    C,
    *,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    state_indices=None,
    out_state_indices=None,
):
    """H = exp(delta A) H + delta x B^T; y = (H C + D x) silu(z), for one token or T of them.

    x and z (b, h, p) or (b, T, h, p), dt (b, h) or (b, T, h), B and C (b, g, n) or (b, T, g, n).
    state (b, h, p, n), or (slots, h, p, n) with state_indices (b,): where each entry's state is
    read, and written unless out_state_indices (b,) names another slot. A negative index is padding:
    nothing is read or written for it and its y is 0.
    Returns y, shaped as x, and the new state, shaped and typed as state; state itself stays.
    """
    if x.dim() == 3:
        x, dt, B, C = (v[:, None] for v in (x, dt, B, C))
        z = None if z is None else z[:, None]
        options = dict(D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit)
        indices = dict(state_indices=state_indices, out_state_indices=out_state_indices)
        y, state = ssd_step(state, x, dt, A, B, C, **options, **indices)
        return y[:, 0], state

    source = torch.arange(x.size(0), device=x.device) if state_indices is None else state_indices
    target = source if out_state_indices is None else out_state_indices
    y, final = ssd_scan(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_states=state[source.clamp(min=0)],
        return_final_states=True,
        form="recurrent",
    )
    y = torch.where((source < 0)[:, None, None, None], torch.zeros_like(y), y)
    kept = (source >= 0) & (target >= 0)
    return y, state.index_copy(0, target[kept].long(), final[kept].to(state.dtype))
