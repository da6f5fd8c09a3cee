"""The normalisation after the scan, with the gate inside it or outside."""

import torch
import torch.nn.functional as F
from einops import rearrange

from .discretise import working_dtype


def gated_rmsnorm(x, weight, z=None, *, eps=1e-5, group_size=None, norm_before_gate=False):
    """norm(v) = v / sqrt(mean(v^2) + eps) * weight over groups of channels; with the gate z
    y = norm(x silu(z)), or y = norm(x) silu(z) if norm_before_gate.

    x and z (..., d), weight (d,); group_size divides d and defaults to it. Computed in fp64 if x is
    fp64, else fp32; y (..., d) has x's dtype. Source: paper, section 7 ("extra normalization").
    """
    work = working_dtype(x)
    gate = None if z is None else F.silu(z.to(work))
    v = x.to(work)
    if gate is not None and not norm_before_gate:
        v = v * gate
    groups = rearrange(v, "... (k s) -> ... k s", s=group_size or x.size(-1))
    groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    y = rearrange(groups, "... k s -> ... (k s)") * weight.to(work)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)
