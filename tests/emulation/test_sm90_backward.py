"""The sm_90a backward's own source on the emulated card, against the reference: ragged tails,
packed sequences, resets, groups, slices of heads, states and their gradients. The hardware's copies
and products come early, late or at random."""

import dataclasses
from functools import partial

import pytest
import torch
from cases import Case, extreme_steps, make_gradients, make_inputs, steep_and_flat_heads
from common import check, check_inputs, expected_error, op_arguments, run_ops, truth
from random_problems import judge_draws

SM90, INVARIANT = 3, 3 | 1 << 8
TICKETS, SEGMENTS = 1 << 4, 2 << 4  # the forward's schedules

PER_ROW = ("x", "dt", "B", "C", "z", "initial_states")  # inputs

BASE = Case(b=1, l=150, h=2, p=64, g=1, n=64, dtype=torch.bfloat16, D="h", dt_bias=True)
CASES = {
    "plain": dict(),
    "one block of tokens": dict(l=40, d_final_states=False, seed=1),
    "whole chunks": dict(l=256, h=1, seed=2),
    "two rows, odd heads": dict(b=2, l=133, h=3, initial_states="working", seed=3),
    "n 128": dict(n=128, initial_states="x", seed=4),
    "D per channel": dict(D="hp", l=70, seed=5),
    "no D, no bias": dict(D=None, dt_bias=False, dt_softplus=False, seed=6),
    "groups": dict(h=6, g=2, l=70, n=128, seed=7),
    "fp16": dict(dtype=torch.float16, seed=8),
    "fp32 dt": dict(dt_dtype=torch.float32, dt_limit=(0.05, 0.12), seed=9),
    "packed": dict(l=300, cu_seqlens=(0, 3, 3, 70, 230, 300), initial_states="working", seed=10),
    "packed, tokens outside": dict(l=300, n=128, cu_seqlens=(5, 70, 71, 260), seed=11),
    "packed, three heads": dict(
        l=300, h=3, cu_seqlens=(0, 3, 70, 230, 300), initial_states="working", seed=37
    ),
    "resets": dict(seq_idx=True, initial_states="working", seed=12),
    "weak decay": dict(decay="weak", l=300, seed=13),
    "strong decay": dict(decay="strong", l=300, seed=14),
    "sliced": dict(sliced=True, seed=15),
    "states counted on the way": dict(l=4100, h=1, seed=38),
    "p 128": dict(p=128, n=128, h=3, initial_states="working", seed=19),
    "p 192, packed": dict(p=192, l=200, D="hp", cu_seqlens=(0, 70, 200), seed=20),
    "p 128, groups, sliced": dict(p=128, b=2, l=70, h=4, g=2, sliced=True, seed=21),
    "p 256": dict(p=256, h=1, l=140, seed=22),
    "p 80": dict(p=80, h=3, D="hp", initial_states="working", sliced=True, seed=23),
    "p 96, packed": dict(p=96, l=200, cu_seqlens=(0, 70, 200), initial_states="x", seed=24),
    "p 32": dict(p=32, n=128, initial_states="working", seed=25),
    "z": dict(z=True, n=128, h=3, initial_states="working", seed=26),
    "z, no D, fp16": dict(z=True, D=None, dtype=torch.float16, l=40, seed=27),
    "z, p 128, packed": dict(
        z=True, p=128, D="hp", l=200, cu_seqlens=(3, 70, 70, 190), sliced=True, seed=28
    ),
    "z, p 80, groups": dict(z=True, p=80, b=2, h=4, g=2, l=140, sliced=True, seed=29),
    "z, p 40, resets": dict(z=True, p=40, l=140, seq_idx=True, seed=30),
    "n 256": dict(n=256, h=3, initial_states="working", seed=33),
    "n 256, p 80, groups": dict(n=256, p=80, b=2, h=4, g=2, D="hp", sliced=True, seed=34),
    "n 256, z, packed": dict(
        n=256, z=True, l=300, cu_seqlens=(3, 70, 70, 230, 290), initial_states="x", seed=35
    ),
    "n 256, strong decay, fp16": dict(
        n=256, decay="strong", l=300, dtype=torch.float16, save_states=True, seed=36
    ),
    "z, weak decay": dict(z=True, decay="weak", l=300, seed=31),
    "z, strong decay": dict(z=True, decay="strong", l=300, seed=32),
}


@pytest.mark.parametrize("name", CASES)
def test_backward(emulated, name):
    emulated.schedule(seed=len(name), timing=("random", "late", "early")[len(name) % 3], sms=3)
    check(run_ops(emulated.ops, plan=SM90), dataclasses.replace(BASE, **CASES[name]))


KEPT = {
    "plain": dict(),
    "one chunk": dict(l=100, initial_states="working"),
    "two chunks": dict(l=200, n=128, h=3),
    "weak decay": dict(decay="weak", l=400, initial_states="working"),
    "packed": dict(l=400, n=128, cu_seqlens=(3, 70, 70, 200, 390), initial_states="x"),
    "p 80, z, groups": dict(p=80, z=True, b=2, l=200, h=4, g=2, initial_states="working"),
    "fp16, p 128": dict(dtype=torch.float16, p=128, l=140, D="hp"),
}


@pytest.mark.parametrize("variant", [TICKETS, SEGMENTS])
@pytest.mark.parametrize("name", KEPT)
def test_states_kept_by_the_forward(emulated, name, variant):
    """The forward writes what the backward's own sweep would, and the backward reads it."""
    emulated.schedule(seed=len(name), timing=("random", "late", "early")[len(name) % 3], sms=3)
    case = dataclasses.replace(BASE, save_states=True, seed=40 + len(name), **KEPT[name])
    plan = INVARIANT | variant  # which keeps however few the heads are
    run = run_ops(emulated.ops, plan=plan)
    inputs = make_inputs(case)
    kept = emulated.ops.ssd_scan_forward(
        *op_arguments(inputs)[0], *op_arguments(inputs)[1], False, True, plan
    )[2]
    blocks = -(-case.p // 64)
    chunks = case.l // 128 + case.sequences if case.cu_seqlens else case.b * -(-case.l // 128)
    assert kept.numel() == chunks * case.h * blocks * 64 * case.n
    check(run, case)


def test_states_are_waited_for(emulated):
    """Of few heads of a long sequence chunk_scan_backward goes on when all states are counted, and
    not when one is missing."""
    chunks = 33
    case = dataclasses.replace(BASE, l=128 * chunks - 100, h=1, seed=41)
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    tensors, options = op_arguments(inputs)

    def backward():
        return emulated.ops.ssd_scan_backward(dy, d_final, *tensors, None, *options, SM90)

    emulated.schedule(most_released=chunks - 1)
    with pytest.raises(RuntimeError, match="deadlock.*(nanosleep|ld_acquire_gpu)"):
        backward()
    emulated.schedule(most_released=chunks)
    assert not any(torch.isnan(t).any() for t in backward())


# A card of 16 SMs has all sweeps of these at once: chunks in order, and from the middle on.
COUNTED = {
    "short, packed": dict(l=300, h=3, cu_seqlens=(0, 70, 300), initial_states="working", seed=42),
    "long, packed": dict(l=8400, h=1, cu_seqlens=(0, 4300, 8370), seed=43),
    "n 256, two rows": dict(b=2, l=300, n=256, seed=44),
}


@pytest.mark.parametrize("name", COUNTED)
def test_states_counted_of_several_sequences(emulated, name):
    case = dataclasses.replace(BASE, **COUNTED[name])
    emulated.schedule(seed=len(name), timing="random", sms=16)
    check(run_ops(emulated.ops, plan=SM90), case)
    emulated.schedule(sms=16, most_released=0)
    with pytest.raises(RuntimeError, match="deadlock"):  # so they were counted
        run_ops(emulated.ops, plan=SM90)(make_inputs(case), *make_gradients(case))


# Of the yardstick's error, by decay and n, where tokens are weighed in two words, and, at n = 128,
# where dCB is (docs/numerics.md).
LESS = {
    ("weak", 64): {"d_initial_states": 0.8, "dA": 0.8, "dB": 0.85, "dC": 0.85},
    ("usual", 64): {"d_initial_states": 0.2},
    ("usual", 128): {"dB": 0.85, "dC": 0.85},
    ("strong", 128): {"dB": 0.85, "dC": 0.85},
}


@pytest.mark.parametrize("sms", [1, 16])  # three heads a block of the sweeps; two
@pytest.mark.parametrize("decay, n", LESS)
def test_two_words(emulated, decay, n, sms):
    """What is rounded once less than in the yardstick."""
    emulated.schedule(seed=sms, sms=sms)
    case = dataclasses.replace(
        BASE, l=300, h=3, n=n, initial_states="working", decay=decay, seed=40
    )
    results = run_ops(emulated.ops, plan=SM90)(make_inputs(case), *make_gradients(case))
    for name, share in LESS[decay, n].items():
        error = (results[name].double() - truth(case)[name]).norm()
        assert error <= share * expected_error(case)[name][0].norm(), name


RESETS = {  # tokens at which the state resets, of 300: chunks begin at 128 and 256, blocks at 64
    "of every third token": range(3, 300, 3),
    "at the ends of runs of 16, blocks and chunks": (15, 16, 63, 64, 65, 127, 128, 192, 255, 257),
    "in one block of two": (70, 71, 110, 130, 131),
}


@pytest.mark.parametrize("n", [64, 128])  # rows in their order; folded
@pytest.mark.parametrize("name", RESETS)
def test_resets(emulated, name, n):
    """Few decays, so that what resets add to their logarithms would show. Runs take turns in two
    numbers: what resets is that the number changes."""
    case = dataclasses.replace(BASE, b=2, l=300, h=3, n=n, decay="weak", dt_dtype=torch.float32)
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    resets = torch.zeros(2, 300, dtype=torch.int32)
    resets[0, list(RESETS[name])] = 1
    resets[1, 150] = 1
    inputs["seq_idx"] = (resets.cumsum(1) % 2).int()
    emulated.schedule(seed=n, sms=16)
    check_inputs(run_ops(emulated.ops, plan=SM90), inputs, dy, d_final)


@pytest.mark.parametrize("n, plan", [(64, SM90 | TICKETS), (128, SM90 | TICKETS)])
def test_resets_cost_no_bits(emulated, n, plan):
    """One chunk that no state enters or leaves: its dA and d_dt come of pairs alone, as exact as
    fp32 is. Of 16 draws, for dA of one is few numbers."""
    case = dataclasses.replace(BASE, l=40, h=3, n=n, decay="weak", dt_dtype=torch.float32)
    case = dataclasses.replace(case, seq_idx=True, d_final_states=False)
    emulated.schedule(seed=n)
    draws = [dataclasses.replace(case, seed=k) for k in range(16)]
    judge_draws(run_ops(emulated.ops, plan=plan), draws)


@pytest.mark.parametrize("n", [64, 128])
def test_nothing_crosses_a_reset(emulated, n):
    """Where only tokens behind the last reset have dy, those before it get zeros, and no others."""
    case = dataclasses.replace(BASE, l=300, h=3, n=n, D=None, d_final_states=False, seed=45)
    inputs, (dy, _) = make_inputs(case), make_gradients(case)
    for last in (37, 100, 128, 170, 256):
        inputs["seq_idx"] = (torch.arange(300)[None] >= last).int()
        dy_last = dy * inputs["seq_idx"][..., None, None]
        results = run_ops(emulated.ops, plan=SM90)(inputs, dy_last, None)
        for name in ("dx", "dB", "dC"):
            assert results[name][:, :last].count_nonzero() == 0, (name, last)
            assert results[name][:, last].count_nonzero() > 0, (name, last)


@pytest.mark.parametrize("sms", [1, 132])
def test_slices_of_heads(emulated, sms):
    """One slice on a small card, one head a slice on a large one."""
    emulated.schedule(seed=sms, sms=sms)
    check(run_ops(emulated.ops, plan=SM90), dataclasses.replace(BASE, h=5, seed=16))


# Slices of so many heads that their parts of dB and dC lie in memory of G that has been read.
SHARED = {
    "the last blocks in another order": dict(h=40, l=300, seed=50),
    "n 128, all blocks side by side": dict(h=26, l=300, n=128, seed=51),
    "groups": dict(h=44, g=2, l=200, p=128, n=128, seed=52),
    "packed": dict(h=40, l=400, cu_seqlens=(3, 70, 70, 200, 390), sms=32, D="hp", seed=53),
    "n 256": dict(h=40, l=300, n=256, seed=54),
}


@pytest.mark.parametrize("name", SHARED)
def test_slices_share_images(emulated, name):
    options = {"sms": 12} | SHARED[name]
    sms = options.pop("sms")
    case = dataclasses.replace(BASE, **options)
    emulated.schedule(seed=len(name), timing="random", blocks=5, sms=sms)
    results = check(run_ops(emulated.ops, plan=SM90), case, repeat=False)
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    tensors, options = op_arguments(inputs)

    def backward():
        return emulated.ops.ssd_scan_backward(dy, d_final, *tensors, None, *options, SM90)

    emulated.schedule(seed=len(name), timing="late", blocks=1, sms=sms)
    assert torch.equal(backward()[3], results["dB"])
    emulated.schedule(sms=sms, most_released=0)
    with pytest.raises(RuntimeError, match="deadlock"):  # blocks do wait until images are read
        backward()


@pytest.mark.parametrize("z", [False, True])
def test_sequences_do_not_depend_on_their_neighbours(emulated, z):
    """With batch_invariant, a row's gradients are the same bits alone and in a batch."""
    case = dataclasses.replace(BASE, b=2, l=140, h=3, initial_states="working", z=z, seed=17)
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    emulated.schedule(sms=132)
    together = run_ops(emulated.ops, plan=INVARIANT)(inputs, dy, d_final)
    for row in range(2):
        mine = {k: v[row : row + 1] if k in PER_ROW else v for k, v in inputs.items()}
        mine = run_ops(emulated.ops, plan=INVARIANT)(
            mine, dy[row : row + 1], d_final[row : row + 1]
        )
        names = ("dx", "d_dt", "dB", "dC", "d_initial_states", *(("dz",) if z else ()))
        for name in names:
            assert torch.equal(mine[name], together[name][row : row + 1]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("A, delta, mixed", [(-1.0, 100.0, False), (0.0, 1e-4, False)])
@pytest.mark.parametrize("save_states", [False, True])
def test_extreme_steps(emulated, A, delta, mixed, save_states, dtype):
    """Decays that are subnormal in fp32; a state that stays what it was."""
    inputs = extreme_steps(A, delta, mixed, dtype, h=4, p=64, n=64)
    run = run_ops(emulated.ops, plan=INVARIANT if save_states else SM90)
    check_inputs(partial(run, save_states=save_states), *inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steep_and_flat_heads_together(emulated, dtype):
    check_inputs(run_ops(emulated.ops, plan=SM90), *steep_and_flat_heads(dtype, p=64, n=64))
