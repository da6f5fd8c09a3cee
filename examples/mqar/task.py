"""The task: remember keys with their values, and give the value when a key comes again.

    k1 v1 k2 v2 ... | filler, with each key once somewhere in it

Keys are from the lower half of the vocabulary, values from the upper, filler from all of it; within
a sequence no key comes twice as one. The answer is wanted where the key is asked for.
Source: paper, section 9.1.1 and appendix D.1.
"""

import torch

PAIRS_OF_STAGES = (32, 16, 8, 4)  # the curriculum: l / 32 pairs first, l / 4 last


def draw(batch, l, pairs, vocab, generator=None, device="cpu"):
    """tokens (batch, l), where the queries are (batch, pairs) and their answers (batch, pairs)."""
    random = dict(generator=generator, device=device)
    if 3 * pairs > l or pairs > vocab // 2:
        raise ValueError(f"{pairs} pairs need {3 * pairs} tokens of {l}, and as many keys")

    def distinct(count, below):
        return torch.rand(batch, below, **random).argsort(1)[:, :count]

    keys = distinct(pairs, vocab // 2)
    values = torch.randint(vocab // 2, vocab, (batch, pairs), **random)
    tokens = torch.randint(vocab, (batch, l), **random)
    tokens[:, 0 : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    queries = 2 * pairs + distinct(pairs, l - 2 * pairs)
    tokens.scatter_(1, queries, keys)
    return tokens, queries, values


def pairs_at(progress, l):
    """How many pairs a training step has, progress (0 .. 1) of the way: stages are equally long."""
    stage = min(len(PAIRS_OF_STAGES) - 1, int(progress * len(PAIRS_OF_STAGES)))
    return max(1, l // PAIRS_OF_STAGES[stage])
