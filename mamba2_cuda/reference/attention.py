"""Two older layers that are ssd_scan with particular arguments (paper, sections 4.1 and 4.3)."""

import torch

from .ssd_scan import ssd_scan


def linear_attention(q, k, v):
    """Causal attention without the softmax: o_i = sum_{j<=i} (q_i . k_j) v_j.

    q and k (b, l, h, n), v (b, l, h, p) -> (b, l, h, p).
    """
    scores = torch.einsum("bihn,bjhn->bhij", q, k).tril()
    return torch.einsum("bhij,bjhp->bihp", scores, v)


def retention(q, k, v, gamma):
    """The same with a constant decay per head: o_i = sum_{j<=i} gamma^(i-j) (q_i . k_j) v_j.

    gamma (h,), in (0, 1].
    """
    token = torch.arange(q.size(1), device=q.device)
    distance = (token[:, None] - token).clamp(min=0)
    scores = torch.einsum("bihn,bjhn->bhij", q, k) * gamma[:, None, None] ** distance
    return torch.einsum("bhij,bjhp->bihp", scores.tril(), v)


def linear_attention_as_ssd(q, k, v, scan=ssd_scan, **options):
    """C = q, B = k, x = v, every step of size 1, and no decay: A = 0."""
    dt = torch.ones(q.shape[:3], dtype=v.dtype, device=v.device)
    return scan(v, dt, torch.zeros_like(dt[0, 0]), k, q, **options)


def retention_as_ssd(q, k, v, gamma, scan=ssd_scan, **options):
    """C = q, B = k, x = v, every step of size 1, A = log(gamma)."""
    dt = torch.ones(q.shape[:3], dtype=v.dtype, device=v.device)
    return scan(v, dt, gamma.log(), k, q, **options)
