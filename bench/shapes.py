"""The problems that are measured, and what each must at least move and compute.

Sizes: b batch, l length, h heads, p head dim, g groups, n state dim.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    name: str
    b: int
    l: int
    h: int
    p: int
    g: int
    n: int

    @property
    def tokens(self):
        return self.b * self.l

    @property
    def attention_heads(self):
        """Heads of 128 channels of attention in a model of the same width (h p = 2 d_model)."""
        return self.h * self.p // 256


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("2.7b_b8_l4k", 8, 4096, 80, 64, 1, 128),
        Shape("2.7b_b2_l16k", 2, 16384, 80, 64, 1, 128),
        Shape("2.7b_b1_l64k", 1, 65536, 80, 64, 1, 128),
        Shape("2.7b_b1_l2k", 1, 2048, 80, 64, 1, 128),
        Shape("130m_b8_l2k", 8, 2048, 24, 64, 1, 128),
        Shape("8b_g8_b4_l4k", 4, 4096, 128, 64, 8, 128),
        Shape("2.7b_n64_b8_l4k", 8, 4096, 80, 64, 1, 64),
        Shape("2.7b_n256_b8_l4k", 8, 4096, 80, 64, 1, 256),
    )
}
# Launches dominate here, so these are also replayed from a CUDA graph.
LAUNCH_BOUND = ("2.7b_b1_l2k", "130m_b8_l2k")

# The two halves of the paper's benchmark figure.
SWEEP_TOKENS = 65536
LENGTH_SWEEP = [Shape(f"l{l}", SWEEP_TOKENS // l, l, 80, 64, 1, 128) for l in
                (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)]  # fmt: skip
STATE_SWEEP = [Shape(f"n{n}", 8, 4096, 80, 64, 1, n) for n in (16, 32, 64, 128, 256)]


def over_ops(function, shape, op):
    """A function of the package's explain on a shape: a training step is forward and backward."""
    parts = ("fwd", "bwd") if op == "train" else (op,)
    return sum(function(o, shape.b, shape.l, shape.h, shape.p, shape.g, shape.n) for o in parts)


def attention_flops(shape, op):
    """Causal attention of the same width: half of the (l, l) matrix."""
    forward = 2 * shape.b * shape.attention_heads * shape.l**2 * 128
    return {"fwd": forward, "bwd": 2.5 * forward, "train": 3.5 * forward}[op]


def inputs(shape, dtype, device, requires_grad, seed=0):
    """Random arguments as a model has them: (x, dt, A, B, C) and the options D and dt_bias."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size, dtype=dtype):
        return torch.randn(*size, generator=random, device=device).to(dtype)

    def uniform(low, high):
        return torch.empty(shape.h, device=device).uniform_(low, high, generator=random)

    b, l, h, p, g, n = shape.b, shape.l, shape.h, shape.p, shape.g, shape.n
    arguments = (normal(b, l, h, p), normal(b, l, h), -uniform(1, 16), normal(b, l, g, n),
                 normal(b, l, g, n))  # fmt: skip
    options = {"D": normal(h, dtype=torch.float32), "dt_bias": uniform(-6.9, -2.2)}
    for tensor in (*arguments, *options.values()):
        tensor.requires_grad_(requires_grad)
    return arguments, options
