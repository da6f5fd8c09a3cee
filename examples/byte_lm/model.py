"""Mamba-2 for bytes, in plain PyTorch around ssd_scan.

One block is  u + mixer(norm(u)), and the mixer (paper, section 7) is
    z, x, B, C, dt = in_proj(u)
    x, B, C = silu(causal_conv(x, B, C))
    y       = ssd_scan(x, dt, A, B, C) * silu(z)
    out     = out_proj(norm(y))
Every layer takes the state it left behind and goes on from there, so the same forward serves
training, a prompt, and one byte at a time.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mamba2_cuda import ssd_scan

CONV_WIDTH = 4


@dataclass(frozen=True)
class Sizes:
    d_model: int
    layers: int
    p: int  # head dim
    n: int  # state dim
    expand: int = 2
    g: int = 1  # groups of B and C

    @property
    def d_inner(self):
        return self.expand * self.d_model

    @property
    def h(self):
        return self.d_inner // self.p


class Mixer(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.sizes = s = sizes
        conv_channels = s.d_inner + 2 * s.g * s.n
        self.in_proj = nn.Linear(s.d_model, s.d_inner + conv_channels + s.h, bias=False)
        self.conv = nn.Parameter(torch.empty(CONV_WIDTH, conv_channels))
        self.conv_bias = nn.Parameter(torch.zeros(conv_channels))
        self.A_log = nn.Parameter(torch.empty(s.h).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(s.h))
        # softplus(dt_bias) is log-uniform in [1e-3, 1e-1]: memories of 10 to 1000 tokens.
        dt = torch.exp(torch.empty(s.h).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.norm = nn.RMSNorm(s.d_inner, eps=1e-5)
        self.out_proj = nn.Linear(s.d_inner, s.d_model, bias=False)
        nn.init.uniform_(self.conv, -(CONV_WIDTH**-0.5), CONV_WIDTH**-0.5)

    def forward(self, u, state=None):
        """u (b, l, d_model), state of the tokens before -> the same shape, state after."""
        s = self.sizes
        tail, H = state or (None, None)
        z, xBC, dt = self.in_proj(u).split([s.d_inner, self.conv.shape[1], s.h], dim=-1)
        xBC, tail = self.causal_conv(xBC, tail)
        x, B, C = xBC.split([s.d_inner, s.g * s.n, s.g * s.n], dim=-1)
        y, H = ssd_scan(
            x.unflatten(-1, (s.h, s.p)),
            dt,
            -self.A_log.exp(),
            B.unflatten(-1, (s.g, s.n)),
            C.unflatten(-1, (s.g, s.n)),
            D=self.D,
            z=z.unflatten(-1, (s.h, s.p)),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            initial_states=H,
            return_final_states=True,
        )
        return self.out_proj(self.norm(y.flatten(-2))), (tail, H)

    def causal_conv(self, v, tail):
        """silu of a depthwise convolution over the last CONV_WIDTH tokens of v (b, l, channels)."""
        if tail is None:
            tail = v.new_zeros(v.shape[0], CONV_WIDTH - 1, v.shape[2])
        v = torch.cat([tail, v], dim=1)
        l = v.shape[1] - (CONV_WIDTH - 1)
        out = sum(v[:, k : k + l] * w for k, w in enumerate(self.conv.to(v.dtype)))
        return F.silu(out + self.conv_bias.to(v.dtype)), v[:, l:]


class ByteLM(nn.Module):
    """bytes (b, l) int64 -> logits (b, l, 256); the embedding is also the output layer."""

    def __init__(self, sizes):
        super().__init__()
        self.embedding = nn.Embedding(256, sizes.d_model)
        self.norms = nn.ModuleList(nn.RMSNorm(sizes.d_model) for _ in range(sizes.layers))
        self.mixers = nn.ModuleList(Mixer(sizes) for _ in range(sizes.layers))
        self.final_norm = nn.RMSNorm(sizes.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for mixer in self.mixers:  # keeps the sum over layers at the scale of one
            nn.init.normal_(mixer.in_proj.weight, std=0.02)
            nn.init.normal_(mixer.out_proj.weight, std=0.02 / math.sqrt(sizes.layers))

    def forward(self, tokens, states=None):
        u = self.embedding(tokens)
        after = []
        for norm, mixer, state in zip(self.norms, self.mixers, states or [None] * len(self.norms)):
            out, state = mixer(norm(u), state)
            u = u + out
            after.append(state)
        return F.linear(self.final_norm(u), self.embedding.weight), after

    @torch.no_grad()
    def generate(self, prompt, length, temperature=0.7, generator=None):
        """`prompt` (bytes) and `length` bytes after it, each drawn from the model."""
        device = self.embedding.weight.device
        logits, states = self(torch.tensor([list(prompt)], device=device))
        text = bytearray(prompt)
        for _ in range(length):
            chances = torch.softmax(logits[0, -1].float() / temperature, dim=-1).cpu()
            text.append(int(torch.multinomial(chances, 1, generator=generator)))
            logits, states = self(torch.tensor([[text[-1]]], device=device), states)
        return bytes(text)
