"""The SSD operator in its three forms: recurrent, quadratic, block (paper, sections 3, 5 and 6).

    delta_t = clamp(softplus(dt_t + dt_bias))      a_t = delta_t A
    H_t     = exp(a_t) H_{t-1} + delta_t x_t B_t^T
    y_t     = (H_t C_t + D x_t) silu(z_t)

Plain PyTorch, differentiable by autograd, with nothing in common with the kernels: they are held to
this. Each form below works on whole rows; packing, resets, skip and gate are the same for all.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from .discretise import log_decay, step_size, working_dtype
from .semiseparable import decay_matrix


def recurrent(x, delta, a, B, C, state):
    """H_t = exp(a_t) H_{t-1} + delta_t x_t B_t^T, y_t = H_t C_t, one token after another.

    x (b, l, h, p), delta and a (b, l, h), B and C (b, l, h, n), state (b, h, p, n)
    -> y (b, l, h, p), the state after the last token (b, h, p, n).
    """
    decay = a.exp()[..., None, None]
    weighted_x = (delta[..., None] * x)[..., None]
    y = []
    for decay_t, x_t, B_t, C_t in zip(*(v.unbind(1) for v in (decay, weighted_x, B, C))):
        state = decay_t * state + x_t * B_t[..., None, :]
        y.append((state @ C_t[..., None]).squeeze(-1))
    return torch.stack(y, 1), state


def quadratic(x, delta, a, B, C, state):
    """y = M x with M = (L o C B^T) diag(delta): attention with the mask L instead of a softmax.

    Shapes as in `recurrent`. Time and memory grow with l^2.
    """
    L = decay_matrix(rearrange(a, "b l h -> b h l"))
    CB = torch.einsum("bihn,bjhn->bhij", C, B)
    M = L * CB * rearrange(delta, "b j h -> b h 1 j")
    y = torch.einsum("bhij,bjhp->bihp", M, x)

    from_start = a.cumsum(1).exp()  # how much of the initial state is left at token i
    y = y + from_start[..., None] * torch.einsum("bhpn,bihn->bihp", state, C)
    to_end = rearrange(L[:, :, -1], "b h j -> b j h") * delta
    final = torch.einsum("bjh,bjhp,bjhn->bhpn", to_end, x, B)
    return y, final + from_start[:, -1, :, None, None] * state


def block(x, delta, a, B, C, state, chunk=64):
    """Chunks of q tokens: quadratic inside a chunk, recurrent from chunk to chunk.

    Shapes as in `recurrent`. The four stages carry the names of the kernels' stages.
    """
    l = x.size(1)
    padding = -l % chunk  # tokens with delta = 0 and a = 0 change nothing

    def chunks(v):
        v = F.pad(v, (0, 0) * (v.dim() - 2) + (0, padding))
        return rearrange(v, "b (c q) h ... -> b c h q ...", q=chunk)

    x, delta, a, B, C = (chunks(v) for v in (x, delta, a, B, C))
    L, from_start, to_end = chunk_cumsum(a)
    states = chunk_state(x, delta * to_end, B)
    entering, final = state_passing(states, from_start[..., -1], state)
    y = chunk_scan(x, delta, L, B, C, entering, from_start)
    return rearrange(y, "b c h q p -> b (c q) h p")[:, :l], final


def chunk_cumsum(a):
    """The decays of a chunk, all at most 1. a (b, c, h, q).

    -> L_ij (b, c, h, q, q); from the chunk's start to token i, from token j to the chunk's end,
    both (b, c, h, q).
    """
    L = decay_matrix(a)
    return L, a.cumsum(-1).exp(), L[..., -1, :]


def chunk_state(x, weight, B):
    """What a chunk adds to the state: sum_j weight_j x_j B_j^T.

    x (b, c, h, q, p), weight (b, c, h, q), B (b, c, h, q, n) -> (b, c, h, p, n).
    """
    return torch.einsum("bchjp,bchjn->bchpn", weight[..., None] * x, B)


def state_passing(states, decay, state):
    """S_{c+1} = decay_c S_c + states_c. states (b, c, h, p, n), decay (b, c, h).

    -> the states entering the chunks (b, c, h, p, n), the state after the last (b, h, p, n).
    """
    entering = []
    for decay_c, added in zip(decay.unbind(1), states.unbind(1)):
        entering.append(state)
        state = decay_c[..., None, None] * state + added
    return torch.stack(entering, 1), state


def chunk_scan(x, delta, L, B, C, entering, from_start):
    """y_i = sum_{j<=i} L_ij delta_j (C_i . B_j) x_j + from_start_i S C_i -> (b, c, h, q, p)."""
    CB = torch.einsum("bchin,bchjn->bchij", C, B)
    inside = (L * CB * delta[..., None, :]) @ x
    return inside + from_start[..., None] * torch.einsum("bchpn,bchin->bchip", entering, C)


FORMS = {"recurrent": recurrent, "quadratic": quadratic, "block": block}


def sequence_bounds(cu_seqlens, l):
    """Begin and end of each packed sequence: values clamped to [0, l] and made monotone."""
    cu = cu_seqlens.clamp(0, l).cummax(0).values.tolist()
    return list(zip(cu[:-1], cu[1:]))


def hide_outside(v, bounds):
    """v with 0 at the tokens of no sequence, whatever lies there. v (b, l, ...), or None."""
    if v is None or bounds is None:
        return v
    token = torch.arange(v.size(1), device=v.device)
    begin, end = (bounds[0][0], bounds[-1][1]) if bounds else (0, 0)
    outside = (token < begin) | (token >= end)
    return v.masked_fill(outside.reshape(-1, *[1] * (v.dim() - 2)), 0)


def apply_by_sequence(form, tensors, state, bounds):
    """A form on each packed sequence by itself; tokens outside all of them give 0.

    tensors: x, delta, a, B, C with b = 1; state (nseq, h, p, n). -> y (1, l, h, p), final states.
    """
    x = tensors[0]
    y, final, end = [], [], 0
    for i, (begin, stop) in enumerate(bounds):
        y.append(torch.zeros_like(x[:, end : max(end, begin)]))
        y_i, final_i = apply_to_rows(form, [v[:, begin:stop] for v in tensors], state[i : i + 1])
        y.append(y_i)
        final.append(final_i)
        end = stop
    y.append(torch.zeros_like(x[:, end:]))
    return torch.cat(y, 1), torch.cat(final, 0) if final else state


def apply_to_rows(form, tensors, state):
    """A form on whole rows; with no token there is no output and the state stays."""
    x = tensors[0]
    return form(*tensors, state) if x.numel() else (torch.zeros_like(x), state)


def ssd_scan(
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
    initial_states=None,
    cu_seqlens=None,
    seq_idx=None,
    return_final_states=False,
    form="block",
):
    """The operator, as the header of this file states it.

    x and z (b, l, h, p), dt (b, l, h), A and dt_bias (h,), B and C (b, l, g, n), D (h,) or (h, p),
    initial_states (b, h, p, n); with cu_seqlens (nseq + 1,), b = 1 and they are (nseq, h, p, n).
    seq_idx (b, l): the state is forgotten where it changes. Computed in fp64 if x is fp64, else in
    fp32; y has x's dtype. form: "recurrent", "quadratic" or "block".
    Returns y (b, l, h, p), or y and the final states, shaped as initial_states.
    Source: paper, equation 2 with the scalar A of section 5, the skip and the gate of section 7.
    """
    work = working_dtype(x)
    out_dtype, l, h = x.dtype, x.size(1), x.size(2)
    x, dt, A, B, C = (v.to(work) for v in (x, dt, A, B, C))
    D, z, dt_bias, initial_states = (
        None if v is None else v.to(work) for v in (D, z, dt_bias, initial_states)
    )
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, l)
    x, dt, B, C, z = (hide_outside(v, bounds) for v in (x, dt, B, C, z))
    delta = step_size(dt, dt_bias, dt_softplus, dt_limit)
    a = log_decay(delta, A, seq_idx)
    B, C = (repeat(v, "b l g n -> b l (g r) n", r=h // v.size(2)) for v in (B, C))

    if initial_states is None:
        sequences = x.size(0) if bounds is None else len(bounds)
        initial_states = x.new_zeros(sequences, h, x.size(3), B.size(3))
    tensors = (x, delta, a, B, C)
    if bounds is None:
        y, final_states = apply_to_rows(FORMS[form], tensors, initial_states)
    else:
        y, final_states = apply_by_sequence(FORMS[form], tensors, initial_states, bounds)

    if D is not None:
        y = y + (D[:, None] if D.dim() == 1 else D) * x
    if z is not None:
        y = y * F.silu(z)
    y = hide_outside(y, bounds).to(out_dtype)
    return (y, final_states) if return_final_states else y
