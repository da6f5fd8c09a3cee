"""Root mean square norms, with and without a gate."""

from typing import NamedTuple

import torch
from torch import nn

from mamba2_cuda.ops.ssd_scan import autocast_dtype

from . import functional


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, computed in fp32 and returned in weight's dtype."""

    def __init__(self, d, eps=1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d, device=device, dtype=dtype))

    def forward(self, x):
        return functional.gated_rmsnorm(x, self.weight, eps=self.eps).to(self.weight.dtype)

    def add(self, residual, x):
        """The sum of residual (b, l, d) and x, where x is not None, and its norm: one kernel.

        The norm has the dtype that a linear layer behind it computes in: autocast's, where that is
        on. Without gradients the sum takes residual's place. x may be Unprojected.
        """
        if isinstance(x, Unprojected):
            return residual, x.add_and_norm(residual[:, 0], self)[:, None]
        dtype = autocast_dtype(self.weight)
        if torch.is_grad_enabled():
            return functional.add_norm(residual, x, self.weight, eps=self.eps, dtype=dtype)
        x = None if x is None else x.flatten(0, 1)
        y = functional.add_norm_(residual.flatten(0, 1), x, self.weight, eps=self.eps, dtype=dtype)
        return residual, y.view(residual.shape)


class GatedRMSNorm(nn.Module):
    """norm(y silu(z)), or norm(y) silu(z) with norm_before_gate, over groups of group_size."""

    def __init__(self, d, group_size, norm_before_gate, eps=1e-5, device=None, dtype=None):
        super().__init__()
        self.options = dict(eps=eps, group_size=group_size, norm_before_gate=norm_before_gate)
        self.weight = nn.Parameter(torch.ones(d, device=device, dtype=dtype))

    def forward(self, y, z):
        return functional.gated_rmsnorm(y, self.weight, z, **self.options)


class Unprojected(NamedTuple):
    """What a step of a mixer adds to the residual, before its norm and projection: those, the sum
    and the residual's next norm are one operator."""

    y: torch.Tensor  # (b, channels)
    z: torch.Tensor  # (b, channels), its gate
    norm: GatedRMSNorm
    out_proj: nn.Linear

    def project(self):
        """As (b, 1, d_model), like what other layers add."""
        return self.out_proj(self.norm(self.y, self.z))[:, None]

    def add_and_norm(self, residual, norm):
        """Adds it to residual (b, d_model) in place; returns the sum's norm."""
        return functional.norm_linear_add_norm_(
            residual, self.y, self.norm.weight, self.out_proj.weight, self.out_proj.bias,
            next_weight=norm.weight, z=self.z, next_eps=norm.eps, early_weights=True,
            **self.norm.options,
        )  # fmt: skip
