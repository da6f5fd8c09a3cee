"""What is compared: two blocks of Mamba-2, of Mamba-1, or of attention."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from mamba2_cuda.nn import Attention, Block, Mamba2, RMSNorm
from mamba2_cuda.nn.conv import CausalConv1d
from mamba2_cuda.reference import selective_scan

MIXERS = ("mamba2", "mamba1", "attention")


class Mamba1(nn.Module):
    """Mamba's mixer around the selective scan in plain PyTorch (Gu & Dao 2023, section 3.4)."""

    def __init__(self, d_model, d_state=16, d_conv=4, expand=2):
        super().__init__()
        d, self.rank, self.n = expand * d_model, math.ceil(d_model / 16), d_state
        self.in_proj = nn.Linear(d_model, 2 * d, bias=False)
        self.conv1d = CausalConv1d(d, d_conv)
        self.x_proj = nn.Linear(d, self.rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.rank, d, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        dt = torch.exp(torch.empty(d).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d, 1))
        self.D = nn.Parameter(torch.ones(d))
        self.out_proj = nn.Linear(d, d_model, bias=False)

    def forward(self, u, tokens=None, cache=None):
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = self.conv1d(x)
        dt, B, C = self.x_proj(x).split([self.rank, self.n, self.n], dim=-1)
        y = selective_scan(
            x, self.dt_proj(dt), -self.A_log.exp(), B, C,
            D=self.D, z=z, dt_bias=self.dt_bias, dt_softplus=True, form="recurrent",
        )  # fmt: skip
        return self.out_proj(y)


def make_mixer(kind, d_model, d_state):
    if kind == "mamba2":
        return Mamba2(d_model, d_state=d_state, headdim=min(64, d_model))
    if kind == "mamba1":
        return Mamba1(d_model, d_state=d_state)
    return Attention(d_model, num_heads=max(1, d_model // 64))


class Recall(nn.Module):
    """Embedding (and positions, for attention), blocks, norm, and the embedding again as head."""

    def __init__(self, kind, d_model, d_state, vocab, l, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = None
        if kind == "attention":
            self.position = nn.Parameter(0.02 * torch.randn(l, d_model))
        self.blocks = nn.ModuleList(
            Block(d_model, make_mixer(kind, d_model, d_state)) for _ in range(layers)
        )
        self.norm = RMSNorm(d_model)

    def forward(self, tokens, queries):
        """Logits (b, pairs, vocab) where the queries (b, pairs) are."""
        u = self.embedding(tokens)
        if self.position is not None:
            u = u + self.position[: tokens.size(1)]
        for block in self.blocks:
            u = block(u)
        u = u.gather(1, queries[..., None].expand(-1, -1, u.size(-1)))
        return F.linear(self.norm(u), self.embedding.weight)
