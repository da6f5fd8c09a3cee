"""How the next token is chosen from logits."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """Applied in this order; the defaults draw from the model's own distribution.

    repetition_penalty  of a token that has occurred, a positive logit is divided by it, a negative
                        one multiplied
    temperature         logits are divided by it; 0: the most likely token, what follows is idle
    top_k               keep the k most likely tokens (0: all), and those as likely as the last
    top_p               keep the most likely tokens, as few as together have probability top_p
    min_p               keep tokens at least min_p times as likely as the most likely one
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        valid = {
            "temperature": 0 <= self.temperature < math.inf,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
        }
        for name, good in valid.items():
            if not good:
                raise ValueError(f"Sampling: {name} cannot be {getattr(self, name)}")

    def choose(self, logits, occurred=None, generator=None):
        """logits (b, vocab) -> tokens (b,). occurred (b, vocab) bool, for repetition_penalty.

        No host synchronisation, so that a CUDA graph can hold it.
        """
        if self.temperature == 0 and self.repetition_penalty == 1:
            return logits.argmax(-1)
        logits = logits.float()
        if self.repetition_penalty != 1:
            factor = self.repetition_penalty
            penalised = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(occurred, penalised, logits)
        if self.temperature == 0:
            return logits.argmax(-1)
        chances = self.restrict(logits / self.temperature).softmax(-1)
        # The first of independent exponential clocks of these rates to ring.
        noise = torch.empty_like(chances).exponential_(generator=generator)
        return (chances / noise).argmax(-1)

    def restrict(self, logits):
        """logits with -inf where a token is not kept."""
        if 0 < self.top_k < logits.size(-1):
            last = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < last, -math.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(descending=True, stable=True)
            chances = ordered.softmax(-1)
            before = chances.cumsum(-1) - chances  # of all more likely tokens
            kept = (before < self.top_p).scatter(-1, order, before < self.top_p)
            logits = logits.masked_fill(~kept, -math.inf)
        if self.min_p > 0:
            chances = logits.softmax(-1)
            least = self.min_p * chances.max(-1, keepdim=True).values
            logits = logits.masked_fill(chances < least, -math.inf)
        return logits
