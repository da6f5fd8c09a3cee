"""How exact a 16-bit kernel can be: the block form and its backward, rounding named operands only.

Everything runs in fp64 but the operands of matrix products, which tensor cores take in 16 bits:
    forward   x, B, C as given; the weighted x~_j = 2^(s_q-s_j) delta_j x_j; M = C B^T o L o delta;
              the state S entering a chunk
    backward  dy (times silu(z) where there is a gate); the weighted 2^s_i dy_i, x~ and M again;
              the gradient G of the state leaving a chunk; dCB, summed over the heads of a group
and each result once, to the dtype it is returned in. The backward is written by hand because the
roundings of a backward are not the derivatives of the forward's. docs/ssd.md derives it in these
symbols, docs/numerics.md says how the errors are read.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat

from .discretise import log_decay, step_size
from .ssd_scan import chunk_cumsum, chunk_state, hide_outside, sequence_bounds, state_passing


@torch.no_grad()
def yardstick(
    inputs,
    dy,
    d_final_states=None,
    d_log_decay=None,
    *,
    operand=None,
    working=torch.float64,
    chunk=64,
    smallest_decay=0.0,
):
    """Outputs and gradients of ssd_scan with the roundings above.

    inputs: the arguments of ssd_scan by name. dy (b, l, h, p); d_final_states as final_states;
    d_log_decay (nseq, h), the gradient of sum_t a_t, which ssd_segment_state returns.
    operand: the 16-bit dtype, or None to round nothing; working: what all else runs in;
    smallest_decay: a decay below it is 0.
    Returns by name y, final_states, dx, d_dt, dA, dB, dC, dD, dz, d_dt_bias, d_initial_states, but
    those of absent arguments; a gradient has its argument's dtype, final_states stays unrounded.
    """
    given = {"D": None, "z": None, "dt_bias": None, "initial_states": None, **inputs}
    v = {k: to_working(t, working) for k, t in given.items()}
    options = {k: given[k] for k in ("dt_softplus", "dt_limit") if k in given}
    b, l, h, p = v["x"].shape
    packed = given.get("cu_seqlens") is not None
    bounds = sequence_bounds(given["cu_seqlens"], l) if packed else [(0, l)]
    v["dt"] = hide_outside(v["dt"], bounds)
    delta, slope = step_size_and_slope(v["dt"], v["dt_bias"], **options)
    a = log_decay(delta, v["A"], given.get("seq_idx"))

    none = v["x"].new_zeros(len(bounds) if packed else b, h, p, v["B"].size(3))
    incoming = (v["initial_states"], to_working(d_final_states, working))
    states, d_states = (none if u is None else u for u in incoming)
    d_log = none[..., 0, 0] if d_log_decay is None else to_working(d_log_decay, working)
    tokens = {k: v[k] for k in ("x", "B", "C", "z")}
    tokens |= {"delta": delta, "a": a, "dy": to_working(dy, working)}
    ends = (states, d_states, d_log)
    rounding = Rounding(operand, smallest_decay)
    d = every_sequence(tokens, v["D"], ends, bounds if packed else None, rounding, chunk)

    d_dt = (d.per_token["delta"] + v["A"] * d.per_token["a"]) * slope
    out = {
        "y": d.per_token["y"],
        "final_states": d.final,
        "dx": d.per_token["x"],
        "d_dt": d_dt,
        "dA": reduce(delta * d.per_token["a"], "b l h -> h", "sum"),
        "dB": d.per_token["B"],
        "dC": d.per_token["C"],
        "dD": d.D if v["D"] is None or v["D"].dim() == 2 else d.D.sum(-1),
        "dz": d.per_token["z"],
        "d_dt_bias": reduce(d_dt, "b l h -> h", "sum"),
        "d_initial_states": d.initial,
    }
    return rounded_results(out, given)


def every_sequence(tokens, D, ends, bounds, rounding, chunk):
    """`sequence` for all rows at once, or, with bounds, for each packed sequence by itself.

    ends: states entering, gradients of the states leaving (nseq, h, p, n), and of sum_t a_t
    (nseq, h). Returns per_token (y, and gradients by argument), final, initial and D, the gradients
    of the states entering and of D per channel. A token outside all sequences has 0 everywhere.
    """
    per_token = {k: torch.zeros_like(tokens[k]) for k in ("x", "delta", "a", "B", "C")}
    per_token |= {k: torch.zeros_like(tokens["x"]) for k in ("y", "z")}
    final, initial = ends[0].clone(), ends[1].clone()
    dD = torch.zeros_like(tokens["x"]).sum((0, 1))
    whole_rows = [(0, tokens["x"].size(1))]
    for i, (begin, end) in enumerate(whole_rows if bounds is None else bounds):
        if begin == end:
            continue
        rows = slice(None) if bounds is None else slice(i, i + 1)
        t = {k: None if u is None else u[:, begin:end] for k, u in tokens.items()}
        s = sequence(t, D, *(u[rows] for u in ends), rounding, chunk)
        for k, u in s.per_token.items():
            per_token[k][:, begin:end] = u
        final[rows], initial[rows] = s.final, s.initial
        dD += s.D
    return SimpleNamespace(per_token=per_token, final=final, initial=initial, D=dD)


def to_working(value, working):
    floating = torch.is_tensor(value) and value.is_floating_point()
    return value.to(working) if floating else value


# Each gradient's argument; y is returned in x's dtype.
ARGUMENT_OF = {
    **{"y": "x", "dx": "x", "d_dt": "dt", "dA": "A", "dB": "B", "dC": "C", "dD": "D", "dz": "z"},
    **{"d_dt_bias": "dt_bias", "d_initial_states": "initial_states"},
}


def rounded_results(out, given):
    """Each result in the dtype it is returned in; gradients of absent arguments left out."""
    out = {k: v for k, v in out.items() if given[ARGUMENT_OF.get(k, "x")] is not None}
    return {k: v.to(given[ARGUMENT_OF[k]].dtype) if k in ARGUMENT_OF else v for k, v in out.items()}


def step_size_and_slope(dt, dt_bias=None, dt_softplus=False, dt_limit=(0.0, math.inf)):
    """delta, and its derivative in dt: 0 where the clamp acts."""
    v = dt if dt_bias is None else dt + dt_bias
    raw = F.softplus(v) if dt_softplus else v
    slope = v.sigmoid() if dt_softplus else torch.ones_like(v)
    free = (raw >= dt_limit[0]) & (raw <= dt_limit[1])
    return step_size(dt, dt_bias, dt_softplus, dt_limit), slope * free


class Rounding:
    """Rounds an operand to the 16-bit dtype and back; to nothing at all with None."""

    def __init__(self, operand, smallest_decay):
        self.operand, self.smallest_decay = operand, smallest_decay

    def __call__(self, v):
        return v if self.operand is None else v.to(self.operand).to(v.dtype)

    def decay(self, v):
        return v.masked_fill(v < self.smallest_decay, 0)


def sequence(t, D, state, d_state, d_log_decay, rounding, chunk):
    """Forward and backward of rows that are one sequence each: t holds x, delta, a, B, C, z, dy."""
    l, g = t["x"].size(1), t["B"].size(2)

    def chunks(v):
        v = F.pad(v, (0, 0) * (v.dim() - 2) + (0, -l % chunk))
        return rearrange(v, "b (c q) h ... -> b c h q ...", q=chunk)

    def tokens(v):
        return rearrange(v, "b c h q ... -> b (c q) h ...")[:, :l]

    def per_head(v):
        return repeat(v, "b c g q n -> b c (g r) q n", r=t["x"].size(2) // g)

    x, delta, a = (chunks(t[k]) for k in ("x", "delta", "a"))
    B, C = (per_head(chunks(t[k])) for k in ("B", "C"))
    s = forward(x, delta, a, B, C, state, rounding)

    skip = 0 if D is None else (D[:, None] if D.dim() == 1 else D)
    y = tokens(s.y) + skip * t["x"]
    gate = 1 if t["z"] is None else F.silu(t["z"])
    dy = rounding(t["dy"] * gate)
    d = backward(s, chunks(dy), d_state, d_log_decay, rounding, g)
    out = {"x": tokens(d.x) + skip * dy, "y": y * gate}
    out |= {k: tokens(getattr(d, k)) for k in ("delta", "a", "B", "C")}
    out["a"] = out["a"].masked_fill(t["a"].isinf(), 0)  # a reset is no function of delta A
    if t["z"] is not None:
        sigmoid = t["z"].sigmoid()
        out["z"] = t["dy"] * y * sigmoid * (1 + t["z"] * (1 - sigmoid))
    dD = reduce(dy * t["x"], "b l h p -> h p", "sum")
    return SimpleNamespace(per_token=out, final=s.final, initial=d.initial, D=dD)


def forward(x, delta, a, B, C, state, rounding):
    """y_i = sum_{j<=i} L_ij delta_j (C_i . B_j) x_j + 2^s_i S C_i, and the state after the last."""
    L, from_start, to_end = map(rounding.decay, chunk_cumsum(a))
    x_weighted = rounding((to_end * delta)[..., None] * x)
    states = chunk_state(x_weighted, torch.ones_like(delta), B)
    S, final = state_passing(states, from_start[..., -1], state)
    S_operand = rounding(S)
    CB = torch.einsum("bchin,bchjn->bchij", C, B)
    M = rounding(L * CB * delta[..., None, :])
    SC = torch.einsum("bchpn,bchin->bchip", S_operand, C)
    y = M @ x + from_start[..., None] * SC
    return SimpleNamespace(**locals())


def backward(s, dy, d_final, d_log_decay, rounding, g):
    """Gradients in the chunk layout (b, c, h, q, ...), from what the forward computed."""
    dy_weighted = rounding(s.from_start[..., None] * dy)
    G, d_initial = state_gradients(s, dy_weighted, d_final)
    G_operand = rounding(G)
    GB = torch.einsum("bchpn,bchjn->bchjp", G_operand, s.B)
    d = SimpleNamespace(initial=d_initial)
    d.x = (s.to_end * s.delta)[..., None] * GB + s.M.mT @ dy

    # dCB_ij = sum over the heads of a group of L_ij delta_j (dy_i . x_j)
    over_group = "b c (g r) ... -> b c g ..."
    dyx = torch.einsum("bchip,bchjp->bchij", dy, s.x)
    dCB = rounding(reduce(s.L * s.delta[..., None, :] * dyx, over_group, "sum", g=g))
    B, C = (reduce(v, over_group, "max", g=g) for v in (s.B, s.C))  # equal in all heads of a group
    d.B = torch.einsum("bchpn,bchjp->bchjn", G_operand, s.x_weighted)
    d.B = reduce(d.B, over_group, "sum", g=g) + dCB.mT @ C
    d.C = torch.einsum("bchpn,bchip->bchin", s.S_operand, dy_weighted)
    d.C = reduce(d.C, over_group, "sum", g=g) + dCB @ B

    V = s.L * s.CB * dyx
    E = s.from_start * (dy * s.SC).sum(-1)
    F_over_delta = s.to_end * (s.x * GB).sum(-1)
    K = s.from_start[..., -1] * (G * s.S).sum((-1, -2))
    V_strict = V.tril(-1)
    R = (V_strict * s.delta[..., None, :]).sum(-1)
    Q = s.delta * V_strict.sum(-2)
    F_j = s.delta * F_over_delta
    after = (R + E - Q).flip(-1).cumsum(-1).flip(-1)  # sum over i >= t
    before = F_j.cumsum(-1) - F_j  # sum over j < t
    d.a = after + before + K[..., None] + d_log_decay[:, None, :, None]
    d.delta = F_over_delta + V.sum(-2)
    return d


def state_gradients(s, dy_weighted, d_final):
    """G, the gradient of the state leaving each chunk, from the last chunk to the first.

    G_prev = 2^s_q G + sum_i 2^s_i dy_i C_i^T. -> G (b, c, h, p, n), d_initial (b, h, p, n).
    """
    added = chunk_state(dy_weighted, torch.ones_like(s.delta), s.C)
    leaving, d_initial = state_passing(added.flip(1), s.from_start[..., -1].flip(1), d_final)
    return leaving.flip(1), d_initial
