"""The sm_90a forward on the emulated card, against the reference: both schedules, every tile shape,
ragged tails, packed sequences, gates and states. The backward of these cases is another tier's,
whose tests stand in their own file."""

import dataclasses

import pytest
import torch
from cases import Case, make_inputs
from common import check, op_arguments, run_ops

# Plans that force tier sm90 and a schedule.
TICKETS, SEGMENTS, PREFIXES = 3 | 1 << 4, 3 | 2 << 4, 3 | 3 << 4

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
    "p 80, sliced": dict(p=80, l=97, sliced=True, z=True, D="hp", seed=17),
    "p 32, packed": dict(p=32, cu_seqlens=(3, 6, 6, 71, 120), initial_states="x", seed=18),
    "p 40, odd heads": dict(p=40, h=3, l=97, D="hp", initial_states="working", seed=19),
    "n 16, states": dict(n=16, l=97, h=3, initial_states="working", z=True, seed=21),
    "n 40, two rows, groups": dict(n=40, b=2, l=70, h=4, g=2, initial_states="x", D="hp", seed=22),
    "n 8, p 80, packed": dict(
        n=8, p=80, cu_seqlens=(3, 6, 6, 71, 120), initial_states="working", seed=23
    ),
    "n 256": dict(n=256, l=200, initial_states="x", seed=12),
    "n 256, two rows, ragged, gate": dict(n=256, b=2, l=97, z=True, D="hp", seed=13),
    "n 256, packed": dict(n=256, cu_seqlens=(3, 6, 6, 71, 120), initial_states="working", seed=14),
    "n 256, groups, fp16": dict(n=256, h=4, g=2, l=70, dtype=torch.float16, seed=15),
    "n 256, p 128, resets": dict(n=256, h=1, p=128, seq_idx=True, seed=16),
    "n 256, p 80": dict(n=256, p=80, l=97, z=True, initial_states="working", seed=20),
}


@pytest.mark.parametrize("plan", [TICKETS, SEGMENTS], ids=["tickets", "segments"])
@pytest.mark.parametrize("name", CASES)
def test_forward(emulated, name, plan):
    emulated.schedule(seed=len(name), timing=("random", "late", "early")[len(name) % 3], sms=3)
    check(run_ops(emulated.ops, plan=plan), dataclasses.replace(BASE, **CASES[name]))


PREFIX_CASES = {
    "three rows, odd heads": (dict(b=3, l=133, h=3, initial_states="working", seed=1), 16),
    "four runs": (dict(l=450, h=1, initial_states="x", z=True, seed=2), 4),
    "n 128, kept states": (dict(n=128, l=400, save_states=True, initial_states="x", seed=3), 3),
    "n 256, resets": (dict(n=256, l=260, h=3, seq_idx=True, initial_states="working", seed=4), 8),
    "p 80, gate": (dict(p=80, l=200, z=True, D="hp", initial_states="working", seed=5), 5),
    "groups, strong decay": (dict(h=4, g=2, l=300, decay="strong", seed=6), 5),
    "n 32, strong decay": (dict(n=32, l=200, decay="strong", initial_states="x", seed=7), 4),
    # Two stages, and runs so short that a loader waits for a stage at each.
    "n 256, short runs": (dict(b=1, l=150, h=2, n=256, seed=40), 4),
    "z, short runs": (dict(b=1, l=191, h=3, n=128, z=True, seed=41), 4),
}


@pytest.mark.parametrize("name", PREFIX_CASES)
def test_prefixes(emulated, name):
    """Few rows: every run of a row sums up itself what comes before it."""
    change, sms = PREFIX_CASES[name]
    emulated.schedule(seed=len(name), timing=("random", "late", "early")[len(name) % 3], sms=sms)
    check(run_ops(emulated.ops, plan=PREFIXES), dataclasses.replace(BASE, **change))


@pytest.mark.parametrize("n", [64, 24])
def test_many_segments(emulated, n):
    """More than pass two adds up by itself: segment_scan does."""
    emulated.schedule(seed=3, timing="random", sms=16)
    check(run_ops(emulated.ops, plan=SEGMENTS), dataclasses.replace(BASE, l=1000, n=n, seed=12))


@pytest.mark.parametrize("p, n", [(64, 256), (80, 64), (64, 32)])
def test_another_tier_runs_the_backward(emulated, p, n):
    """Unforced, and asked to keep states, of which this forward has none to give."""
    case = dataclasses.replace(BASE, l=70, p=p, n=n, save_states=True)
    check(run_ops(emulated.ops), case)


@pytest.mark.parametrize("n, plan", [(64, PREFIXES), (128, TICKETS), (256, SEGMENTS)])
def test_plain_and_general_instances_agree(emulated, n, plan):
    """A in bf16 is what the plain instance does not take. The numbers are the same, and so are the
    bits."""
    case = dataclasses.replace(BASE, l=200, h=3, n=n, z=n > 64, initial_states="working", seed=43)
    inputs, seen = make_inputs(case), []
    for A in (inputs["A"].bfloat16().float(), inputs["A"].bfloat16()):
        emulated.schedule(seed=5, timing="random", sms=5)
        tensors, options = op_arguments(inputs | {"A": A})
        seen.append(emulated.ops.ssd_scan_forward(*tensors, *options, True, False, plan)[:2])
    assert all(torch.equal(plain, general) for plain, general in zip(*seen))


def test_packed_with_nothing_between(emulated):
    """Sequences of one chunk, and of none, with a ring of two stages."""
    cu_seqlens = (0, 40, 40, 90, 150, 150, 150, 150, 150, 150, 200, 260)
    case = dataclasses.replace(BASE, b=1, l=260, h=2, n=256, cu_seqlens=cu_seqlens, seed=42)
    for timing in ("random", "late", "early"):
        emulated.schedule(seed=7, timing=timing, sms=1)
        check(run_ops(emulated.ops, plan=TICKETS), case)
