"""ssd_scan: values and every gradient against fp64, over all arguments, on every tier."""

import math
import random
from dataclasses import replace

import pytest
import torch
from cases import (
    Case,
    case_of,
    extreme_steps,
    make_gradients,
    make_inputs,
    packed,
    pairwise,
    steep_and_flat_heads,
    still_states,
)
from common import check, check_inputs, plans, run_ops, run_public, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mamba2_cuda
import mamba2_cuda.ops

ROWS = [case_of(row, seed) for seed, row in enumerate(pairwise())]
pytestmark = pytest.mark.usefixtures("nan_filled")

ALL = Case(
    D="hp", z=True, dt_bias=True, dt_limit=(0.05, 0.2), initial_states="working", save_states=True
)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_pairwise(case, device, ops):
    for plan in plans(device, case.dtype):
        check(run_ops(ops, plan), case, device)


@pytest.mark.parametrize("case", ROWS[::2], ids=str)
def test_pairwise_public(case, device):
    check(run_public(mamba2_cuda.ssd_scan), case, device)


# What models have, where the tensor-core tiers must not fall through to the plain loops.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p, n", [(32, 128), (64, 64), (64, 128), (64, 256), (80, 128), (128, 256)])
@pytest.mark.parametrize("g", [1, 2])
def test_model_shapes(p, n, g, dtype, device, ops, request):
    if device == "cpu" and not request.config.getoption("full"):
        pytest.skip("the CPU has one path for all shapes, which test_pairwise takes; see --full")
    case = replace(ALL, b=1, l=1000, h=6, p=p, n=n, g=g, dtype=dtype, D="h")
    for plan in plans(device, dtype):
        check(run_ops(ops, plan), case, device)
        check(run_ops(ops, plan), packed(case, random.Random(0), 7), device)


@st.composite
def any_case(draw):
    g = draw(st.integers(1, 3))
    flag = st.booleans()
    case = Case(
        b=draw(st.integers(1, 3)),
        l=draw(st.integers(0, 200)),
        g=g,
        h=g * draw(st.integers(1, 3)),
        p=draw(st.sampled_from((3, 8, 16, 24, 33, 64))),
        n=draw(st.sampled_from((3, 8, 16, 24, 33, 64))),
        dtype=draw(st.sampled_from(DTYPES)),
        dt_dtype=draw(st.sampled_from((None, torch.float32, torch.bfloat16))),
        D=draw(st.sampled_from((None, "h", "hp"))),
        z=draw(flag),
        dt_bias=draw(flag),
        dt_softplus=draw(flag),
        initial_states=draw(st.sampled_from((None, "working", "x"))),
        d_final_states=draw(flag),
        save_states=draw(flag),
        sliced=draw(flag),
        decay=draw(st.sampled_from(("weak", "usual", "strong"))),
        seed=draw(st.integers(0, 1000)),
    )
    packing = draw(st.sampled_from(("rows", "seq_idx", "packed")))
    if packing == "packed":
        cuts = st.lists(st.integers(0, case.l), max_size=8)
        return replace(
            case, b=1, cu_seqlens=tuple(sorted([draw(st.integers(0, case.l)), *draw(cuts)]))
        )
    return replace(case, seq_idx=packing == "seq_idx")


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # a red test is red for everybody
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=any_case())
def test_any_case(case, device, ops):
    for plan in plans(device, case.dtype):
        check(run_ops(ops, plan), case, device)


# ---- extreme steps and decays


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("A", [0.0, -1.0, -1e4])
@pytest.mark.parametrize("delta", [0.0, 1e-4, 100.0])
def test_extreme_steps(A, delta, dtype, device, ops):
    """Every token so, and tokens so between usual ones."""
    for mixed in (False, True):
        inputs = extreme_steps(A, delta, mixed, dtype, device)
        for plan in plans(device, dtype):
            what = f"A={A} delta={delta} mixed={mixed} plan={plan}"
            check_inputs(run_ops(ops, plan), *inputs, what)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steep_and_flat_heads_together(dtype, device, ops):
    """One head forgets at once and one never: a whole chunk's sum would swamp either."""
    inputs = steep_and_flat_heads(dtype, device)
    for plan in plans(device, dtype):
        check_inputs(run_ops(ops, plan), *inputs, f"plan={plan}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_that_stay(dtype, device, ops):
    """Errors of a state that hardly changes are alike at all tokens, and add up in dA."""
    inputs = still_states(dtype, device)
    for plan in plans(device, dtype):
        check_inputs(run_ops(ops, plan), *inputs, f"plan={plan}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_resets(dtype, device, ops):
    """What a reset adds to the logarithms of a chunk must not cost the tokens between resets."""
    case = Case(l=300, n=32, p=32, dtype=dtype, dt_dtype=torch.float32, decay="weak")
    inputs, (dy, d_final) = make_inputs(case, device), make_gradients(case, device)
    runs = torch.arange(300, dtype=torch.int32, device=device) // 3
    inputs["seq_idx"] = runs.expand(2, 300).contiguous()
    for plan in plans(device, dtype):
        check_inputs(run_ops(ops, plan), inputs, dy, d_final, f"plan={plan}")


# ---- strides


def shifted(v):
    """The same values at an address that is no multiple of 16 bytes, in rows that are none."""
    rows, channels = v[0, 0].numel(), math.prod(v.shape[:2])
    memory = torch.full((channels, rows + 3), math.nan, dtype=v.dtype, device=v.device)
    return memory[:, 1 : 1 + rows].unflatten(0, v.shape[:2]).unflatten(2, v.shape[2:]).copy_(v)


def transposed(v):
    """The same values with the token as the last stride."""
    return v.transpose(1, -1).contiguous().transpose(1, -1)


@pytest.mark.parametrize("layout", [shifted, transposed])
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z", "dy"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_strides_give_the_same_bits(name, layout, dtype, device, ops):
    case = replace(ALL, dtype=dtype, p=64, n=64)
    inputs, (dy, d_final) = make_inputs(case, device), make_gradients(case, device)
    for plan in plans(device, dtype):
        expected = run_ops(ops, plan)(inputs, dy, d_final)
        changed = {**inputs, "dy": dy}
        changed[name] = layout(changed[name])
        got = run_ops(ops, plan)(changed, changed.pop("dy"), d_final)
        same_bits(got, expected, f"{name} {layout.__name__} plan={plan}")


def test_sum_backward(device):
    """y.sum().backward() hands over a gradient of stride 0."""
    inputs = make_inputs(ALL, device)
    dy = torch.ones(2, 65, 6, 16, device=device)
    check_inputs(run_public(mamba2_cuda.ssd_scan), inputs, dy[:1, :1, :1, :1].expand_as(dy))


def test_parameters_of_any_strides(device, ops):
    case = replace(ALL, initial_states="working")
    inputs, (dy, d_final) = make_inputs(case, device), make_gradients(case, device)
    expected = run_ops(ops)(inputs, dy, d_final)
    strided = {
        k: torch.stack([v, v * torch.nan], -1)[..., 0]
        for k, v in inputs.items()
        if k in ("A", "D", "dt_bias", "initial_states")
    }
    same_bits(run_ops(ops)({**inputs, **strided}, dy, d_final), expected)


# ---- packed sequences


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sequence_does_not_see_its_neighbours(dtype, device, ops):
    """Neighbours of NaN change no bit, forward or backward."""
    case = replace(ALL, b=1, l=300, p=32, n=32, dtype=dtype, cu_seqlens=(10, 75, 200, 200, 290))
    inputs, (dy, d_final) = make_inputs(case, device), make_gradients(case, device)
    for plan in plans(device, dtype):
        expected = run_ops(ops, plan)(inputs, dy, d_final)
        changed = {**inputs, "dy": dy}
        for name in ("x", "dt", "B", "C", "z", "dy"):
            changed[name] = changed[name].clone()
            changed[name][:, :75] = changed[name][:, 200:] = math.nan
        got = run_ops(ops, plan)(changed, changed.pop("dy"), d_final)
        for name in ("y", "dx", "d_dt", "dB", "dC", "dz"):
            assert torch.equal(got[name][:, 75:200], expected[name][:, 75:200]), f"{name} {plan}"
            outside = torch.cat([got[name][:, :10], got[name][:, 290:]], 1)
            assert (outside == 0).all(), f"{name} outside, plan={plan}"
        for name in ("final_states", "d_initial_states"):
            assert torch.equal(got[name][1], expected[name][1]), f"{name} {plan}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batch_invariant(dtype, device, ops):
    """With bit 8 of the plan a sequence has the same bits alone, in a batch and in a pack."""
    lengths = (65, 1, 200, 64)
    case = replace(
        ALL, b=1, l=sum(lengths), p=64, n=64, dtype=dtype, cu_seqlens=(0, 65, 66, 266, 330)
    )
    inputs, (dy, d_final) = make_inputs(case, device), make_gradients(case, device)
    for plan in plans(device, dtype):
        run = run_ops(ops, plan | 1 << 8)
        together = run(inputs, dy, d_final)
        for i, (begin, end) in enumerate(zip(case.cu_seqlens, case.cu_seqlens[1:])):
            tokens = ("x", "dt", "B", "C", "z")
            alone = {k: v[:, begin:end] if k in tokens else v for k, v in inputs.items()}
            alone |= {"initial_states": inputs["initial_states"][i : i + 1], "cu_seqlens": None}
            rows = {
                k: v.repeat(3, *[1] * (v.dim() - 1))
                for k, v in alone.items()
                if k in (*tokens, "initial_states")
            }
            for what, one, copies in (("alone", alone, 1), ("batch", {**alone, **rows}, 3)):
                dy_i = dy[:, begin:end].repeat(copies, 1, 1, 1)
                got = run(one, dy_i, d_final[i : i + 1].repeat(copies, 1, 1, 1))
                for name in ("y", "dx", "d_dt", "dB", "dC", "dz"):
                    assert torch.equal(got[name][-1], together[name][0, begin:end]), (
                        f"{name} of sequence {i} {what}, plan={plan}"
                    )
                for name in ("final_states", "d_initial_states"):
                    assert torch.equal(got[name][-1], together[name][i]), f"{name} {what} {plan}"


@pytest.mark.parametrize("cu, clamped", [
    ((-5, 20, 90), (0, 20, 65)),
    ((0, 40, 30, 60), (0, 40, 40, 60)),
    ((70, 80), (65, 65)),
    ((-9, -3), (0, 0)),
])  # fmt: skip
@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_bounds_are_clamped(cu, clamped, cu_dtype, device, ops):
    case = replace(ALL, b=1, cu_seqlens=cu, cu_dtype=cu_dtype)
    inputs, (dy, d_final) = make_inputs(case, device), make_gradients(case, device)
    for plan in plans(device, case.dtype):
        got = run_ops(ops, plan)(inputs, dy, d_final)
        good = {**inputs, "cu_seqlens": torch.tensor(clamped, dtype=cu_dtype, device=device)}
        same_bits(got, run_ops(ops, plan)(good, dy, d_final), f"plan={plan}")


@pytest.mark.parametrize("case", [
    replace(ALL, b=0), replace(ALL, l=0), replace(ALL, b=1, cu_seqlens=(3,)),
    replace(ALL, b=1, l=0, cu_seqlens=(0, 0, 0)), replace(ALL, b=1, cu_seqlens=(7, 7, 7)),
], ids=str)  # fmt: skip
def test_nothing_to_do(case, device, ops):
    for plan in plans(device, case.dtype):
        check(run_ops(ops, plan), case, device)


def test_batch_invariant_setting(device):
    """The public setting gives a row of a batch the bits it has alone, and ends with its block."""
    inputs = make_inputs(replace(ALL, b=3, l=200, dtype=torch.bfloat16, p=64, n=64), device)
    alone = {k: v[1:2] if torch.is_tensor(v) and v.size(0) == 3 else v for k, v in inputs.items()}
    with mamba2_cuda.batch_invariant():
        y, final_states = mamba2_cuda.ssd_scan(**inputs, return_final_states=True)
        y_alone, final_alone = mamba2_cuda.ssd_scan(**alone, return_final_states=True)
    assert torch.equal(y[1:2], y_alone) and torch.equal(final_states[1:2], final_alone)
    assert mamba2_cuda.ops.plan.current_plan() == 0
