"""The pre-norm residual block."""

import torch
from torch import nn

from .mixer import Mamba2
from .mlp import GatedMLP
from .norm import RMSNorm


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
        residual = residual + self.mixer(self.norm(residual), tokens, cache)
        return self.after_mixer(residual)

    def after_mixer(self, residual):
        return residual if self.mlp is None else residual + self.mlp(self.norm2(residual))

    def step(self, residual, tokens, cache):
        """forward for one token a row, which may take place in `residual`."""
        fast = isinstance(self.mixer, Mamba2) and self.mixer.adds_fast(residual)
        if not fast or tokens.real() is not None:
            return self(residual, tokens, cache)
        if self.residual_in_fp32:
            residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        self.mixer.add_step(residual[:, 0], self.norm, cache)
        return self.after_mixer(residual)
