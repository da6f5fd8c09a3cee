"""Semiseparable matrices (paper, sections 3 and 6): the matrix that a state space model is.

M is lower triangular, M_ij = exp(a_{j+1} + ... + a_i) C_i . B_j for i >= j: every block of it that
lies on or below the diagonal has rank at most n, the state size. Multiplying by it takes quadratic
time as a matrix and linear time as a recurrence.
"""

import math

import torch
from einops import repeat


def segsum(a):
    """Segment sums: out_ij = a_{j+1} + ... + a_i for i >= j (0 on the diagonal), else -inf.

    a (..., l) -> (..., l, l). Each entry is summed by itself: the difference of two cumulative sums
    cancels, and is NaN where an a_t is -inf.
    """
    l = a.size(-1)
    on_or_below = torch.ones(l, l, dtype=torch.bool, device=a.device).tril()
    terms = repeat(a, "... i -> ... i j", j=l).masked_fill(~on_or_below.tril(-1), 0)
    return terms.cumsum(-2).masked_fill(~on_or_below, -math.inf)


def decay_matrix(a):
    """L = exp(segsum(a)), the 1-semiseparable mask. a (..., l) -> (..., l, l)."""
    return segsum(a).exp()


def materialise(a, B, C):
    """M = L o C B^T. a (..., l), B and C (..., l, n) -> (..., l, l)."""
    return decay_matrix(a) * torch.einsum("...in,...jn->...ij", C, B)


def multiply(a, B, C, x):
    """M x in time linear in l: H_t = exp(a_t) H_{t-1} + x_t B_t^T, y_t = H_t C_t.

    a (..., l), B and C (..., l, n), x (..., l, p) -> (..., l, p).
    """
    state = torch.zeros_like(x[..., :1, :, None] * B[..., :1, None, :]).squeeze(-3)
    y = []
    for t in range(x.size(-2)):
        entry = x[..., t, :, None] * B[..., t, None, :]
        state = a[..., t, None, None].exp() * state + entry
        y.append(torch.einsum("...pn,...n->...p", state, C[..., t, :]))
    return torch.stack(y, -2) if y else torch.zeros_like(x)


def multiply_transposed(a, B, C, y):
    """M^T y in linear time: the same recurrence run from the last token to the first.

    (M^T)_ji = exp(a_{j+1} + ... + a_i) B_j . C_i, so reversing time exchanges B with C and moves
    each decay one token along. a (..., l), B and C (..., l, n), y (..., l, p) -> (..., l, p).
    """
    a_next = torch.cat([torch.zeros_like(a[..., :1]), a.flip(-1)[..., :-1]], -1)
    return multiply(a_next, C.flip(-2), B.flip(-2), y.flip(-2)).flip(-2)


def cumulative_product_sum(a, x):
    """The scalar case n = 1, B = C = 1: y_t = exp(a_t) y_{t-1} + x_t. a and x (..., l)."""
    ones = torch.ones_like(a)[..., None]
    return multiply(a, ones, ones, x[..., None]).squeeze(-1)
