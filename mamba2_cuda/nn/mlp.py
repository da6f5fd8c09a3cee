"""The gated MLP of blocks that have one."""

import torch.nn.functional as F
from torch import nn


class GatedMLP(nn.Module):
    """fc2(value silu(gate)) with value, gate = fc1(x). The hidden size is rounded up to 128."""

    def __init__(self, d_model, hidden, bias=False, device=None, dtype=None):
        super().__init__()
        hidden = -(-hidden // 128) * 128
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x):
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.silu(gate))
