"""What the layers keep of the tokens before, in buffers of fixed address, updated in place."""

from dataclasses import dataclass

import torch


@dataclass
class MixerCache:
    conv: torch.Tensor  # (b, d_conv - 1, conv_channels), the last inputs of the convolution
    ssm: torch.Tensor  # (b, h, p, n), the state
    A: torch.Tensor  # (h,), what the mixer's A was when this began: computed once, not every step

    def states(self):
        """What an empty cache holds zeros in."""
        return [self.conv, self.ssm]


@dataclass
class AttentionCache:
    k: torch.Tensor  # (b, hkv, max_length, head_dim)
    v: torch.Tensor  # (b, hkv, max_length, head_dim)
    conv: torch.Tensor | None  # (b, d_conv - 1, channels of q, k and v)

    def states(self):
        return [] if self.conv is None else [self.conv]


@dataclass
class Cache:
    """The caches of a model's layers and how far they have come.

    seen is a number of the host, first the same on the device: a CUDA graph moves `first` along
    when it is replayed, and whoever replays it moves `seen`.
    """

    layers: list
    first: torch.Tensor  # int64, 0-d
    pads: torch.Tensor  # int64 (b,): tokens of padding at the start of each row
    max_length: int | None = None  # None: no layer limits it
    seen: int = 0
    padded: bool = False

    def reset(self):
        states = [state for layer in self.layers for state in layer.states()]
        for dtype in {state.dtype for state in states}:  # a launch for all of a dtype
            torch._foreach_zero_([state for state in states if state.dtype == dtype])
        self.first.zero_()
        self.pads.zero_()
        self.seen, self.padded = 0, False
