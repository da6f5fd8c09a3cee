"""Tokens in a file that is mapped into memory, and windows of them in an order that is computed.

Which windows make up a batch follows from a seed and the batch's number alone. So a run that goes
on after it was killed needs to remember nothing but its step.
"""

import array
from pathlib import Path

import torch

from mamba2_cuda.model.checkpoint import replace

DTYPES = {"uint16": torch.uint16, "uint32": torch.uint32}


def tokenize(paths, tokenizer, out):
    """Writes the texts' tokens, each text ended by eos, to the file `out`; returns its dtype."""
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    end = [] if tokenizer.eos is None else [tokenizer.eos]

    def write(part):
        with open(part, "wb") as file:
            for path in paths:
                text = Path(path).read_bytes().decode(errors="replace")  # UTF-8 in any locale
                tokens = tokenizer.encode(text) + end
                array.array("H" if dtype == "uint16" else "I", tokens).tofile(file)

    replace(Path(out), write)
    return dtype


def open_tokens(path, dtype="uint16"):
    """The tokens of a file of raw uint16 or uint32, little endian, mapped and not read."""
    size = Path(path).stat().st_size // DTYPES[dtype].itemsize
    if not size:
        raise ValueError(f"{path}: holds no tokens")
    return torch.from_file(str(path), shared=False, size=size, dtype=DTYPES[dtype])


def check_tokens(tokens, vocab_size, where):
    """Reads them all once: a token outside the vocabulary would end a run on its way."""
    for part in tokens.split(1 << 24):
        largest = part.to(torch.int64).max().item()
        if largest >= vocab_size:
            raise ValueError(
                f"{where}: has a token {largest}, but {vocab_size} are in the vocabulary"
            )


def split(tokens, held_out=0.05):
    """(training, held out): the last share of the tokens is held out."""
    if not 0 < held_out < 1:
        raise ValueError(f"the share of tokens held out must be above 0 and below 1: {held_out}")
    kept = len(tokens) - int(len(tokens) * held_out)
    return tokens[:kept], tokens[kept:]


class Windows:
    """An endless sequence of windows of `length` tokens, each with the token after it.

    An epoch is a random order of consecutive windows which share no token; where the first begins
    changes from epoch to epoch.
    """

    def __init__(self, tokens, length, seed=0, what="tokens"):
        if len(tokens) <= length:
            raise ValueError(f"{len(tokens)} {what} are too few for windows of {length}")
        self.tokens, self.length, self.seed = tokens, length, seed
        self.per_epoch = max(1, (len(tokens) - 1) // length - 1)
        self.epoch, self.starts = None, None

    def batch(self, first, count):
        """Windows first .. first + count of the sequence: (inputs, targets), int64 (count, l)."""
        rows = [self.window(i) for i in range(first, first + count)]
        rows = torch.stack([row.to(torch.int64) for row in rows])
        return rows[:, :-1], rows[:, 1:]

    def window(self, i):
        epoch, i = divmod(i, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.starts = epoch, self.order(epoch)
        start = self.starts[i]
        return self.tokens[start : start + self.length + 1]

    def order(self, epoch):
        """Where the windows of an epoch begin."""
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        spare = len(self.tokens) - 1 - self.per_epoch * self.length
        offset = torch.randint(spare + 1, (), generator=random)
        return torch.randperm(self.per_epoch, generator=random) * self.length + offset
