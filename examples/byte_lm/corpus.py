"""Real text that every machine with Python has: the sources of its standard library."""

import hashlib
import sysconfig
from pathlib import Path

import torch

SKIP = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
HELD_OUT_SHARE = 10  # one file in ten is never trained on


def standard_library(folder=None):
    """Returns (training, held out) as 1-d uint8 tensors; a file is wholly in one of the two."""
    folder = Path(folder or sysconfig.get_paths()["stdlib"])
    parts = ([], [])
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if not SKIP.intersection(name.parts):
            parts[is_held_out(name)].append(path.read_bytes())
    return tuple(torch.frombuffer(bytearray(b"\n".join(p)), dtype=torch.uint8) for p in parts)


def is_held_out(name):
    """Decided by the file's name alone, so that it is the same on every run and machine."""
    return hashlib.sha256(name.as_posix().encode()).digest()[0] % HELD_OUT_SHARE == 0


def windows(text, starts, length):
    """(inputs, targets), each (len(starts), length) int64: the target is the next byte."""
    rows = torch.stack([text[s : s + length + 1] for s in starts]).long()
    return rows[:, :-1], rows[:, 1:]
