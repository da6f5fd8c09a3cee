"""Which rows of the mixer's projection are z, x, B, C and dt, and which of them a rank holds."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ProjectionLayout:
    """in_proj's output is [z | x | B | C | dt]; the convolution runs over its middle [x | B | C].

    heads h, headdim p, ngroups g, d_state n: z and x have h p channels, B and C g n, dt h.
    Each part splits over ranks by itself: z, x and dt by heads, B and C by groups (paper, 8.1).
    """

    heads: int
    headdim: int
    ngroups: int
    d_state: int

    @property
    def d_inner(self):
        return self.heads * self.headdim

    @property
    def conv_channels(self):
        return self.d_inner + 2 * self.ngroups * self.d_state

    @property
    def sizes(self):
        """The channels of each part, by name and in order."""
        state = self.ngroups * self.d_state
        return {"z": self.d_inner, "x": self.d_inner, "B": state, "C": state, "dt": self.heads}

    @property
    def width(self):
        return sum(self.sizes.values())

    def split(self, zxBCdt):
        """z (..., h p), xBC (..., h p + 2 g n) and dt (..., h): views of the projection."""
        return zxBCdt.split([self.d_inner, self.conv_channels, self.heads], dim=-1)

    def split_conv(self, xBC):
        """x (..., h, p), B (..., g, n) and C (..., g, n): views of the convolution's output."""
        x, B, C = xBC.split([self.sizes[part] for part in ("x", "B", "C")], dim=-1)
        groups = (self.ngroups, self.d_state)
        return self.by_head(x), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def by_head(self, v):
        """(..., h p) -> (..., h, p)."""
        return v.unflatten(-1, (self.heads, self.headdim))

    def share(self, ranks):
        """The layout of one of `ranks` equal shares, whole heads and whole groups each."""
        if self.heads % ranks or self.ngroups % ranks:
            raise ValueError(
                f"heads ({self.heads}) and ngroups ({self.ngroups}) must be multiples of the "
                f"number of ranks ({ranks})"
            )
        return ProjectionLayout(
            self.heads // ranks, self.headdim, self.ngroups // ranks, self.d_state
        )

    def rows(self, parts, rank=0, ranks=1):
        """Which rows of a weight made of `parts`, such as "zxBCdt" split into names, a rank holds.

        parts: names out of z, x, B, C, dt in the weight's order. Returns indices (int64).
        """
        rows, begin = [], 0
        for part in parts:
            size = self.sizes[part] // ranks
            rows.append(torch.arange(size) + begin + rank * size)
            begin += self.sizes[part]
        return torch.cat(rows)
