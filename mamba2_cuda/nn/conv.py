"""The short convolution's parameters, named and shaped as checkpoints have them."""

import torch
from torch import nn

from . import functional


class CausalConv1d(nn.Module):
    """A depthwise causal convolution over channel-last (b, l, channels), with or without SiLU."""

    def __init__(self, channels, width, bias=True, silu=True, device=None, dtype=None):
        super().__init__()
        self.silu, self.width = silu, width
        self.weight = nn.Parameter(torch.empty(channels, 1, width, device=device, dtype=dtype))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
            nn.init.uniform_(self.bias, -(width**-0.5), width**-0.5)

    def forward(self, x, cu_seqlens=None, state=None):
        """x (b, l, channels) -> the same shape. state (b, width - 1, channels) goes in as what was
        before x and comes out, in place, as what is before the next token."""
        weight, options = self.weight[:, 0], dict(silu=self.silu)
        if state is None:
            return functional.causal_conv1d(x, weight, self.bias, cu_seqlens=cu_seqlens, **options)
        if x.size(1) == 1:
            return self.step(x[:, 0], state)[:, None]
        y, after = functional.causal_conv1d(
            x, weight, self.bias, initial_states=state, return_final_states=True, **options
        )
        state.copy_(after)
        return y

    def step(self, x, state):
        """forward for the next token alone: x (b, channels)."""
        return functional.causal_conv1d_step(state, x, self.weight[:, 0], self.bias, silu=self.silu)
