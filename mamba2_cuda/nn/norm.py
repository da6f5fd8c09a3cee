"""Root mean square norms, with and without a gate."""

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
        on. Without gradients the sum takes residual's place.
        """
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
