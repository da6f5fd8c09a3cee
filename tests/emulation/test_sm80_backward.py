"""The backward of tier sm80 on the emulated card: every gradient against fp64."""

import math
from functools import partial

import pytest
import torch
from cases import (
    FACTORS,
    Case,
    case_of,
    extreme_steps,
    make_gradients,
    make_inputs,
    pairwise,
    steep_and_flat_heads,
    still_states,
)
from common import check, check_inputs, compare, op_arguments, run_ops, same_bits, to_dtype

from mamba2_cuda.reference.yardstick import yardstick

# csrc/ssd/plan.h: forces tier sm80; its variant 1 keeps to the shared memory of small cards.
SM80 = 2
SM80_SMALL_SMEM = SM80 | 1 << 4
BF16 = torch.bfloat16

# Chunks are of 128 tokens, slices of the state 64 x 64 or 64 x 128, splits of up to 16 heads.
SMALL = FACTORS | {
    "dtype": (BF16, torch.float16),
    "p": (16, 64, 80),
    "n": (16, 80, 128),
    "l": (1, 65, 270),
    "h": (3, 6),
}
CASES = [case_of(row, seed) for seed, row in enumerate(pairwise(SMALL))]


# Cuts sequences into segments of two chunks.
SM80_SEGMENTS = SM80 | 2 << 4


@pytest.fixture
def run(emulated):
    return run_ops(emulated.ops, SM80)


def test_the_tier_runs(emulated):
    """Tier any keeps nothing for 16 bits: what is kept shows that the plan was followed."""
    case = Case(b=1, l=130, h=2, p=16, n=16, dtype=BF16)
    tensors, options = op_arguments(make_inputs(case))
    kept = emulated.ops.ssd_scan_forward(*tensors, *options, False, True, SM80)[2]
    assert kept.numel() == 2 * 2 * 16 * 16


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pairwise(run, case, nan_filled):
    check(run, case, repeat=False)


@pytest.mark.parametrize("decay", ["weak", "strong"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_usual_sizes(run, dtype, decay):
    """p 64 and n 128 over several chunks, everything given, dt in fp32: the yardstick's error."""
    options = dict(D="h", z=True, dt_bias=True, initial_states="working")
    check(run, Case(b=1, l=300, h=2, g=1, p=64, n=128, dtype=dtype, dt_dtype=torch.float32,
                    decay=decay, **options))  # fmt: skip


@pytest.mark.parametrize("p, n", [(16, 256), (128, 128), (64, 192)])
@pytest.mark.parametrize("plan", [SM80, SM80_SMALL_SMEM])
def test_large_dims(emulated, plan, p, n):
    case = Case(b=1, l=130, h=2, g=1, p=p, n=n, dtype=BF16, D="hp", z=True)
    check(run_ops(emulated.ops, plan), case, repeat=False)


def test_little_shared_memory_changes_no_bit(emulated):
    """Streamed or resident, the products are the same."""
    case = Case(b=1, l=200, h=3, g=1, p=32, n=144, dtype=BF16, D="h", initial_states="x")
    inputs, gradients = make_inputs(case), make_gradients(case)
    resident = run_ops(emulated.ops, SM80)(inputs, *gradients)
    streamed = run_ops(emulated.ops, SM80_SMALL_SMEM)(inputs, *gradients)
    same_bits(resident, streamed)


@pytest.mark.parametrize("timing", ["early", "late"])
def test_bits_do_not_depend_on_the_schedule(emulated, run, timing):
    case = Case(b=1, l=300, h=6, g=1, p=32, n=128, dtype=BF16, D="h", dt_bias=True)
    inputs, gradients = make_inputs(case), make_gradients(case)
    emulated.schedule(seed=3, timing=timing, blocks=6)
    first = run(inputs, *gradients)
    emulated.schedule(seed=4)
    same_bits(first, run(inputs, *gradients))


def test_bits_do_not_depend_on_the_card(emulated, run):
    case = Case(b=1, l=260, h=4, g=2, p=80, n=128, dtype=BF16)
    inputs, gradients = make_inputs(case), make_gradients(case)
    emulated.schedule(sms=1)
    wide = run(inputs, *gradients)
    emulated.schedule(sms=1000)
    same_bits(wide, run(inputs, *gradients))


@pytest.mark.parametrize("sms", [1, 1000])
@pytest.mark.parametrize("h, g", [(34, 1), (36, 2), (16, 16)])
def test_splits_of_a_group(emulated, run, h, g, sms):
    """One split; three of a group, two uneven ones, and groups of a single head."""
    emulated.schedule(sms=sms)
    check(run, Case(b=1, l=140, h=h, g=g, p=16, n=16, dtype=BF16, D="h"))


def test_splits_do_not_depend_on_the_batch_when_batch_invariant(emulated):
    case = Case(b=2, l=130, h=20, g=1, p=16, n=16, dtype=BF16, D="h")
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)

    def dB(sms, row, plan=SM80):
        emulated.schedule(sms=sms)
        mine = {k: v[row] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
        return run_ops(emulated.ops, plan)(mine, dy[row], d_final[row])["dB"]

    both, second, invariant = slice(0, 2), slice(1, 2), SM80 | 1 << 8
    assert torch.equal(dB(1, both, invariant)[1:], dB(1000, second, invariant))
    assert not torch.equal(dB(1, second), dB(1000, second)), "the plan is to have changed"


@pytest.mark.parametrize("options", [{}, {"cu_seqlens": (3, 3, 140, 150, 290)}], ids=str)
def test_kept_states_change_no_bit(run, options):
    """But of what K is part of: kept states are of one word, those computed anew of two."""
    case = Case(b=1, l=300, p=16, n=32, dtype=BF16, z=True, initial_states="working", **options)
    inputs, gradients = make_inputs(case), make_gradients(case)
    kept = check_inputs(partial(run, save_states=True), inputs, *gradients)
    anew = run(inputs, *gradients)
    same_bits({k: v for k, v in kept.items() if k not in ("dA", "d_dt", "d_dt_bias")}, anew)


@pytest.mark.parametrize(
    "A, dt",
    [(-1e4, 100.0), (0.0, 0.3), (-1.0, 0.0), (-1e-3, 100.0), (-50.0, 1.0)],
)
def test_extremes(run, A, dt):
    """Decay of nothing and of everything, and a step of zero, among ordinary tokens."""
    case = Case(b=1, l=200, h=2, g=1, p=16, n=16, dtype=BF16, dt_softplus=False)
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    inputs["dt"][:, ::3] = dt
    inputs["A"][0] = A
    check_inputs(run, inputs, dy, d_final)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("A, delta, mixed", [
    (-1e4, 100.0, True),  # pairs between tokens that forget all: sums of two words
    (-1.0, 100.0, False),  # decays that are subnormal in fp32
    (0.0, 1e-4, False),  # a state that stays what it was: K from initial_states before rounding
    (-1.0, 1e-4, True),
])  # fmt: skip
def test_extreme_steps(run, A, delta, mixed, dtype):
    check_inputs(run, *extreme_steps(A, delta, mixed, dtype))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_steep_and_flat_heads_together(run, dtype):
    """Weights just below 1 all round one way: half a chunk of them does so as the yardstick's."""
    check_inputs(run, *steep_and_flat_heads(dtype))


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_states_that_stay(run, dtype):
    """The rounding of S is the same in every chunk: K takes it in two words."""
    check_inputs(run, *still_states(dtype))


def test_packed_sequences_do_not_meet(run, nan_filled):
    """NaN before, between (an unread sequence's tokens) and after: no other sequence sees it."""
    case = Case(
        b=1, l=310, p=16, n=16, dtype=BF16, z=True, D="h", cu_seqlens=(4, 4, 150, 155, 300, 300)
    )
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    outside = [slice(0, 4), slice(300, 310)]
    clean = run(inputs, dy, d_final)
    for alien in (*outside, slice(150, 155)):
        for name in ("x", "B", "C", "dt", "z"):
            inputs[name][:, alien] = math.nan
        dy[:, alien] = math.nan
    dirty = run(inputs, dy, d_final)
    for name in ("dx", "d_dt", "dB", "dC", "dz"):
        for tokens in (slice(4, 150), slice(155, 300)):
            assert torch.equal(dirty[name][:, tokens], clean[name][:, tokens]), name
        for tokens in outside:
            assert (dirty[name][:, tokens] == 0).all(), f"{name} outside all sequences"


def test_a_packed_sequence_is_as_if_alone(run):
    case = Case(b=1, l=300, p=32, n=64, dtype=BF16, cu_seqlens=(0, 37, 300), initial_states="x")
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    packed = run(inputs, dy, d_final)
    alone = {
        k: v[:, 37:300] if torch.is_tensor(v) and v.dim() == 4 or k == "dt" else v
        for k, v in inputs.items()
    }
    alone |= {"cu_seqlens": None, "initial_states": inputs["initial_states"][1:]}
    single = run(alone, dy[:, 37:], d_final[1:])
    for name in ("dx", "d_dt", "dB", "dC"):
        assert torch.equal(packed[name][:, 37:], single[name]), name
    assert torch.equal(packed["d_initial_states"][1:], single["d_initial_states"])


@pytest.mark.parametrize("case", [
    Case(b=1, l=900, h=2, g=1, p=16, n=16, dtype=BF16, D="h", initial_states="working"),
    Case(l=650, h=2, p=32, n=80, g=1, dtype=torch.float16, initial_states="x", decay="weak"),
    Case(b=1, l=1100, h=2, g=1, p=16, n=16, dtype=BF16, initial_states="working", decay="weak",
         cu_seqlens=(3, 3, 10, 800, 1090)),
    Case(b=1, l=700, h=2, g=1, p=80, n=16, dtype=BF16, z=True, save_states=True),
    Case(b=1, l=700, h=2, g=1, p=16, n=16, dtype=BF16, initial_states="working", decay="strong"),
], ids=str)  # fmt: skip
def test_segments(emulated, case, nan_filled):
    """Sequences of up to four segments, beside some of one and of none; what a segment forgets."""
    check(run_ops(emulated.ops, SM80_SEGMENTS), case)


def test_destinations(emulated):
    """Gradients land in slices of one projection's gradient, and nothing else of it is touched."""
    case = Case(l=140, h=8, p=16, n=16, z=True, D="h", dtype=BF16)
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    tensors, options = op_arguments(inputs)
    arguments = (dy, d_final, *tensors, None, *options, SM80)
    expected = emulated.ops.ssd_scan_backward(*arguments)
    shapes = {
        "dz": (8, 16),
        "dx": (8, 16),
        "dB": (2, 16),
        "dC": (2, 16),
        "d_dt": (8,),
        "rest": (8,),
    }
    projection = torch.full((2, 140, sum(map(math.prod, shapes.values()))), 7.0, dtype=BF16)
    slices = projection.split([math.prod(s) for s in shapes.values()], dim=2)
    into = {k: v.unflatten(2, s) for (k, s), v in zip(shapes.items(), slices)}
    emulated.ops.ssd_scan_backward_out(
        *arguments, *(into[k] for k in ("dx", "d_dt", "dB", "dC", "dz"))
    )
    names = ("dx", "d_dt", "dA", "dB", "dC", "dD", "dz")
    for name, true in zip(names, expected):
        if name in into:
            assert torch.equal(into[name], true), name
    assert (into["rest"] == 7).all()


def test_segment_state(emulated):
    """The gradient of a segment's decay adds to that of every step of it."""
    case = Case(b=2, l=300, h=4, g=2, p=32, n=32, dtype=BF16, dt_bias=True, dt_dtype=torch.float32)
    inputs, (dy, d_state) = make_inputs(case), make_gradients(case)
    d_log_decay = torch.randn(2, 4)
    tensors = [inputs[k] for k in ("x", "dt", "A", "B", "dt_bias")]
    results = emulated.ops.ssd_segment_state_backward(
        d_state, d_log_decay, *tensors, True, 0.0, math.inf, SM80
    )
    names = ("dx", "d_dt", "dA", "dB", "d_dt_bias")
    inputs["C"], dy = torch.zeros_like(inputs["C"]), torch.zeros_like(dy)

    def in_dtype(dtype, **rounding):
        wide = {k: to_dtype(v, dtype) for k, v in inputs.items()}
        return yardstick(wide, dy, d_state, d_log_decay, **rounding)

    exact = in_dtype(torch.float64)
    rounded = (
        yardstick(inputs, dy, d_state, d_log_decay, operand=BF16),
        in_dtype(torch.float32, working=torch.float32),
    )
    expected = {k: exact[k] for k in names}
    errors = {k: tuple(v[k].double() - exact[k] for v in rounded) for k in names}
    compare(dict(zip(names, results)), expected, errors, inputs)
