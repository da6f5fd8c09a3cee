"""The task: remember keys with their values, and give the value when a key comes again.

    k1 v1 k2 v2 ... | filler, with each key once somewhere in it

Keys are from the lower half of the vocabulary, values from the upper, filler from all of it; within
a sequence no key comes twice as one. The answer is wanted where the key is asked for, more often
soon behind the pairs than late: at distance x with a chance near 1 / x.
Source: paper, section 9.1.1 and appendix D.1; the distances from Arora et al. 2023,
arXiv 2312.04927, who posed the task.
"""

import torch

POWER = 0.01  # the chance of distance x is proportional to x^(POWER - 1)
PAIRS_OF_STAGES = (32, 16, 8, 4)  # the curriculum: l / 32 pairs first, l / 4 last


def draw(batch, l, pairs, vocab, generator=None, device="cpu"):
    """tokens (batch, l), where the queries are (batch, pairs) and their answers (batch, pairs)."""
    random = dict(generator=generator, device=device)
    if 3 * pairs > l or pairs > vocab // 2:
        raise ValueError(f"{pairs} pairs need {3 * pairs} tokens of {l}, and as many keys")

    def distinct(count, weights):
        """`count` places a row, drawn one after another with these weights: those whose
        independent exponential clocks, of these rates, ring first."""
        clocks = torch.rand(batch, len(weights), **random).log_().div_(weights)
        return clocks.topk(count).indices

    keys = distinct(pairs, torch.ones(vocab // 2, device=device))
    values = torch.randint(vocab // 2, vocab, (batch, pairs), **random)
    tokens = torch.randint(vocab, (batch, l), **random)
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    distances = torch.arange(1, l - 2 * pairs + 1, device=device, dtype=torch.float32)
    queries = 2 * pairs + distinct(pairs, distances ** (POWER - 1))
    tokens.scatter_(1, queries, keys)
    return tokens, queries, values


def pairs_at(progress, l):
    """How many pairs a training step has, progress (0 .. 1) of the way: stages are equally long."""
    stage = min(len(PAIRS_OF_STAGES) - 1, int(progress * len(PAIRS_OF_STAGES)))
    return max(1, l // PAIRS_OF_STAGES[stage])
