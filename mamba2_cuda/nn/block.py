"""The pre-norm residual block."""

import torch
from torch import nn

from .mixer import Mamba2
from .mlp import GatedMLP
from .norm import RMSNorm, Unprojected


class Block(nn.Module):
    """residual += mixer(norm(residual)), then residual += mlp(norm2(residual)) if there is an MLP.

    The residual is kept in fp32 (fp64 for an fp64 model) when residual_in_fp32.
    """

    def __init__(
        self, d_model, mixer, d_intermediate=0, eps=1e-5, residual_in_fp32=True,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__()
        made = dict(device=device, dtype=dtype)
        self.residual_in_fp32 = residual_in_fp32
        self.norm = RMSNorm(d_model, eps, **made)
        self.mixer = mixer
        self.norm2 = self.mlp = None
        if d_intermediate:
            self.norm2 = RMSNorm(d_model, eps, **made)
            self.mlp = GatedMLP(d_model, d_intermediate, **made)

    def forward(self, residual, tokens=None, cache=None):
        """residual (b, l, d_model) -> the residual after this block."""
        if self.residual_in_fp32:
            residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        if not torch.is_grad_enabled():
            residual = residual.clone()  # advance writes there
        residual, pending = self.advance(residual, None, tokens, cache)
        if isinstance(pending, Unprojected):
            pending = pending.project()
        return residual if pending is None else residual + pending

    def advance(self, residual, pending, tokens, cache):
        """forward in few kernels; without gradients in place.

        residual (b, l, d_model), in the dtype it is kept in, still lacks `pending`, what the block
        before adds, or None; for RMSNorm.add. Returns the two for the block behind.
        """
        step = self.steps(tokens, cache)
        if pending is None and step and self.mixer.adds_fast(residual[:, 0]):
            self.mixer.add_step(residual[:, 0], self.norm, cache)
        else:
            residual, u = self.norm.add(residual, pending)
            if step and self.mixer.projects_with_next_norm(residual[:, 0]):
                pending = self.mixer.step_unprojected(u, cache)
            else:
                pending = self.mixer(u, tokens, cache)
        if self.mlp is not None:
            residual, u = self.norm2.add(residual, pending)
            pending = self.mlp(u)
        return residual, pending

    def steps(self, tokens, cache):
        """Whether this is one token a row of a mixer that may have kernels of its own for that."""
        one = cache is not None and tokens.l == 1 and tokens.real() is None
        return one and isinstance(self.mixer, Mamba2)
