"""The paper's recipe: AdamW, warm-up and cosine, clipping (section 9.2.1 and appendix D.2)."""

import math
from dataclasses import dataclass

import torch

AT_LEAST_ONE = (
    "steps", "batch", "length", "accumulate", "validate_every", "validation_windows", "save_every",
)  # fmt: skip
NOT_NEGATIVE = ("rate", "min_rate", "warmup", "weight_decay")


@dataclass(frozen=True)
class Recipe:
    """steps of `batch` windows of `length` tokens each; `accumulate` cuts a batch into as many
    parts, one after another on the device."""

    steps: int
    batch: int
    length: int
    rate: float = 3e-3  # highest learning rate: five times that of GPT-3 at 125M parameters
    min_rate: float = 1e-5
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.1
    betas: tuple = (0.9, 0.95)
    clip: float = 1.0
    accumulate: int = 1
    bf16: bool = True  # autocast; the weights stay fp32
    activation_checkpointing: bool = False
    validate_every: int = 100
    validation_windows: int = 32
    save_every: int = 100
    seed: int = 0

    def __post_init__(self):
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.warmup > 1:
            raise ValueError(f"warmup must be a share of the steps, 0 to 1, got {self.warmup}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2^32 - 1, got {self.seed}")
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")
        if self.batch % self.accumulate:
            raise ValueError(f"batch ({self.batch}) % accumulate ({self.accumulate}) != 0")

    def rate_at(self, step):
        """The learning rate of a step, counted from 0."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self.min_rate + (self.rate - self.min_rate) * (1 + math.cos(math.pi * progress)) / 2


def parameter_groups(model, weight_decay):
    """Matrices decay; A_log, D, dt_bias, the weights of norms and biases, all vectors, do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model, recipe):
    groups = parameter_groups(model, recipe.weight_decay)
    fused = all(p.is_cuda for p in model.parameters())
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=recipe.betas, fused=fused)
