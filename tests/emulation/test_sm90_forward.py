"""The sm_90a forward on the emulated card, against the reference: both schedules, every tile shape,
ragged tails, packed sequences, gates and states. The backward of these cases is another tier's,
whose tests stand in their own file."""

import dataclasses

import pytest
import torch
from cases import Case
from common import check, run_ops

TICKETS, SEGMENTS = 3 | 1 << 4, 3 | 2 << 4  # plans that force tier sm90 and a schedule

BASE = Case(b=1, l=150, h=2, p=64, g=1, n=64, dtype=torch.bfloat16, D="h", dt_bias=True)
CASES = {
    "plain": dict(),
    "two rows, ragged, odd heads": dict(b=2, l=133, h=3, initial_states="working", seed=1),
    "n 128": dict(n=128, initial_states="x", seed=2),
    "p 128, D per channel": dict(p=128, D="hp", l=70, seed=3),
    "gate": dict(z=True, l=70, seed=4),
    "groups": dict(h=4, g=2, l=70, seed=5),
    "fp16": dict(dtype=torch.float16, l=70, seed=6),
    "packed": dict(cu_seqlens=(0, 3, 3, 70, 130, 150), initial_states="working", seed=7),
    "packed, tokens outside": dict(cu_seqlens=(5, 70, 71, 140), z=True, seed=8),
    "resets": dict(seq_idx=True, initial_states="working", seed=9),
    "dt fp32, limits, no softplus": dict(
        dt_dtype=torch.float32, dt_softplus=False, dt_limit=(0.05, 0.12), l=70, seed=13
    ),
    "dt fp64": dict(dt_dtype=torch.float64, l=70, seed=14),
    "strong decay": dict(decay="strong", l=70, seed=10),
    "sliced": dict(sliced=True, l=70, seed=11),
}


@pytest.mark.parametrize("plan", [TICKETS, SEGMENTS], ids=["tickets", "segments"])
@pytest.mark.parametrize("name", CASES)
def test_forward(emulated, name, plan):
    emulated.schedule(seed=len(name), timing=("random", "late", "early")[len(name) % 3], sms=3)
    check(run_ops(emulated.ops, plan=plan), dataclasses.replace(BASE, **CASES[name]))


def test_many_segments(emulated):
    """More than pass two adds up by itself: segment_scan does."""
    emulated.schedule(seed=3, timing="random", sms=16)
    check(run_ops(emulated.ops, plan=SEGMENTS), dataclasses.replace(BASE, l=1000, seed=12))
