"""Checkpoints of a run: files that are whole or not there, and that know when they are damaged.

A file is what torch.save writes, then 32 bytes of SHA-256 of that. It is written under another name
and takes its own only when its bytes are on the disk. Reading runs no code from it (weights_only).
"""

import hashlib
import io
import re
from pathlib import Path

import torch

from mamba2_cuda.model.checkpoint import CheckpointError, replace

KEPT = 2
DIGEST_BYTES = 32


def save_state(folder, step, state):
    """Writes state, a table of tensors and plain values, and removes all but the newest KEPT.

    Older ones go only after the new one was read back and found good.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = folder / f"step-{step:09d}.pt"
    replace(path, lambda part: part.write_bytes(content + hashlib.sha256(content).digest()))
    read_content(path)
    for old in states(folder)[:-KEPT]:
        old.unlink()
    return path


def states(folder):
    """The checkpoints of a folder, oldest first."""
    return sorted(p for p in Path(folder).glob("*.pt") if re.fullmatch(r"step-\d{9}", p.stem))


def newest_state(folder):
    """The path of the newest checkpoint.

    Raises CheckpointError when there is none, and when it is damaged: then it says which is the
    newest good one, and touches nothing.
    """
    found = states(folder)
    if not found:
        raise CheckpointError(f"{folder}: no checkpoint to go on from")
    try:
        read_content(found[-1])
    except CheckpointError as cause:
        good = next((p for p in reversed(found[:-1]) if is_good(p)), None)
        advice = "no other is good" if good is None else f"to go on from {good.name}, remove it"
        raise CheckpointError(f"{cause}; {advice}") from cause
    return found[-1]


def load_state(path):
    """What save_state was given, on the CPU. Raises CheckpointError when the file is damaged."""
    return torch.load(io.BytesIO(read_content(path)), map_location="cpu", weights_only=True)


def read_content(path):
    whole = Path(path).read_bytes()
    content, digest = whole[:-DIGEST_BYTES], whole[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise CheckpointError(f"{path}: damaged: its checksum is not that of its content")
    return content


def is_good(path):
    try:
        read_content(path)
    except CheckpointError:
        return False
    return True
