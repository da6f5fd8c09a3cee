"""How the tokens of one forward lie: what is before them, what is padding, what is packed."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """One forward of (b, l) tokens.

    l           tokens in each row
    seen        tokens that the cache already holds
    first       int64, 0-d, on the device: the same as `seen`, for code that a CUDA graph repeats
    pads        int64 (b,) or None: how many tokens of each row, from its start, are padding
    cu_seqlens  (nseq + 1,) or None: the packed sequences of the only row
    """

    l: int
    seen: int = 0
    first: torch.Tensor | None = None
    pads: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None

    def real(self):
        """(b, l) bool, False at padding; None when there is none among these tokens.

        Padding comes before everything else, so that one token after some others is never it.
        """
        if self.pads is None or (self.l == 1 and self.seen > 0):
            return None
        return self.index(self.pads.device) >= self.pads[:, None]

    def index(self, device):
        """(l,): the place of each token in its row, counting what the cache holds."""
        index = torch.arange(self.l, device=device)
        if self.first is not None:
            return index + self.first
        return index + self.seen

    def positions(self, device):
        """(b or 1, l): how many tokens of its own sequence come before each token."""
        index = self.index(device)
        if self.cu_seqlens is not None:
            return (index - self.sequence_starts(index))[None]
        if self.pads is not None:
            return (index - self.pads[:, None]).clamp(min=0)
        return index[None]

    def sequence_starts(self, index):
        """(l,): where the packed sequence of each token begins; at 0 before the first."""
        cu = self.cu_seqlens.to(index.dtype).clamp(0, self.l).cummax(0).values
        number = torch.bucketize(index, cu, right=True)
        return torch.cat([cu.new_zeros(1), cu])[number]

    def attention_mask(self, keys, device):
        """(b or 1, 1, l, keys) bool, True where query i may look at key j; None: plain causal."""
        if self.seen == 0 and keys == self.l and self.pads is None and self.cu_seqlens is None:
            return None
        index, key = self.index(device)[:, None], torch.arange(keys, device=device)
        mask = (key <= index)[None]
        if self.cu_seqlens is not None:
            mask = mask & (key >= self.sequence_starts(index[:, 0])[:, None])
        if self.pads is not None:
            # A padded query looks at itself: a row of no key at all would give NaN.
            mask = mask & ((key >= self.pads[:, None, None]) | (key == index))
        return mask[:, None]
