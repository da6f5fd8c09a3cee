"""Tier any and the CUDA host path, on the emulated card: every output and gradient against fp64."""

import math
from dataclasses import replace

import pytest
import torch
from cases import FACTORS, Case, case_of, make_gradients, make_inputs, pairwise
from common import check, check_inputs, op_arguments, run_ops, same_bits

from mamba2_cuda import reference

ANY = 1  # csrc/ssd/plan.h: forces tier any

# Sizes around the tile of 64, one below it that nothing divides; several chunks with a ragged end.
SMALL = FACTORS | {
    "p": (1, 5, 64, 70),
    "n": (2, 19, 66),
    "l": (0, 1, 63, 65, 130),
    "h": (3, 6),
}


@pytest.fixture
def run(emulated):
    return run_ops(emulated.ops, ANY)


CASES = [case_of(row, seed) for seed, row in enumerate(pairwise(SMALL))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pairwise(run, case, nan_filled):
    check(run, case)


@pytest.mark.parametrize("p, n", [(256, 3), (3, 256)])
def test_largest_dims(run, p, n):
    check(run, Case(b=1, l=66, h=2, g=1, p=p, n=n, D="hp", z=True), repeat=False)


@pytest.mark.parametrize("options", [{}, {"cu_seqlens": (3, 3, 70, 75, 150)}], ids=str)
def test_kept_states_change_no_bit(run, options):
    case = Case(b=1, l=150, p=5, n=3, initial_states="working", **options)
    inputs, gradients = make_inputs(case), make_gradients(case)
    same_bits(run(inputs, *gradients, True), run(inputs, *gradients, False))


def test_kept_states_of_another_problem(emulated):
    inputs, (dy, _) = make_inputs(Case(l=65)), make_gradients(Case(l=65))
    tensors, options = op_arguments(inputs)
    kept = torch.zeros(7)
    with pytest.raises(RuntimeError, match="chunk_states must be what the forward kept, .* got 7"):
        emulated.ops.ssd_scan_backward(dy, None, *tensors, kept, *options, ANY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "A, dt",
    [(-1e4, 100.0), (0.0, 0.3), (-1.0, 0.0), (-1e-3, 100.0), (-50.0, 1.0)],
)
def test_extremes(run, dtype, A, dt):
    """Decay of nothing and of everything, and a step of zero, among ordinary tokens."""
    case = Case(b=1, l=70, h=2, g=1, p=5, n=3, dtype=dtype, dt_softplus=False)
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    inputs["dt"][:, ::3] = dt
    inputs["A"][0] = A
    check_inputs(run, inputs, dy, d_final)


def test_roundings_of_equal_decays_do_not_add_up(run):
    """exp(-1e-4) rounded to fp32 at every token errs by 1.2e-5, ten times what is allowed."""
    case = Case(b=1, l=640, h=1, g=1, p=1, n=1, dt_softplus=False, initial_states="working")
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    inputs["x"].zero_()
    inputs["dt"].fill_(1e-4)
    inputs["A"].fill_(-1.0)
    left = torch.exp(-inputs["dt"].double().sum())
    final_states = run(inputs, dy, d_final)["final_states"].double()
    error = final_states / (left * inputs["initial_states"].double()) - 1
    # A chunk of 64 tokens rounds its decay and its product with the state.
    assert error.abs().max() <= 2 * (640 / 64) * 2**-24


def test_cancelling_decay_gradient(run):
    """Strong decay: d_dt and dA are sums of small terms, lost if formed as differences of large."""
    check(run, Case(b=1, l=130, h=2, g=1, p=5, n=3, decay="strong", dt_bias=True), repeat=False)


BATCH_INVARIANT = 1 << 8  # csrc/ssd/plan.h
# Few blocks for dB and dC on a large card, and a number of heads a group that slices do not divide.
MANY_HEADS = Case(b=1, l=70, h=42, g=2, p=5, n=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("plan", [ANY, ANY | BATCH_INVARIANT])
def test_heads_in_slices(emulated, plan, dtype):
    emulated.schedule(sms=64)
    run = run_ops(emulated.ops, plan)
    check(run, replace(MANY_HEADS, dtype=dtype, z=True))
    check(run, replace(MANY_HEADS, dtype=dtype, cu_seqlens=(3, 3, 9, 14, 68)))


def test_when_heads_are_in_slices(emulated):
    """The card decides; or, so that a batch does not change its rows, the heads alone."""
    dy, d_final = make_gradients(MANY_HEADS)

    def dB(plan, sms, b=1):
        emulated.schedule(sms=sms)
        inputs = make_inputs(MANY_HEADS)
        batched = ("x", "B", "C", "dt")
        inputs |= {k: torch.cat([inputs[k]] * b) for k in batched}
        gradients = torch.cat([dy] * b), torch.cat([d_final] * b)
        return run_ops(emulated.ops, plan)(inputs, *gradients)["dB"][:1]

    assert not torch.equal(dB(ANY, sms=1), dB(ANY, sms=64))  # the order of the sum is another
    invariant = ANY | BATCH_INVARIANT
    assert torch.equal(dB(invariant, sms=1), dB(invariant, sms=64, b=2))


def test_packed_sequences_do_not_meet(run):
    """NaN before, between (an unread sequence's tokens) and after: no other sequence sees it."""
    case = Case(b=1, l=150, p=5, n=3, z=True, D="h", cu_seqlens=(4, 70, 75, 140))
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    outside = [slice(0, 4), slice(140, 150)]
    alien = slice(70, 75)
    clean = run(inputs, dy, d_final)
    for tokens in (*outside, alien):
        for name in ("x", "B", "C", "dt", "z"):
            inputs[name][:, tokens] = math.nan
        dy[:, tokens] = math.nan
    dirty = run(inputs, dy, d_final)
    for name in ("y", "dx", "d_dt", "dB", "dC", "dz"):
        for tokens in (slice(4, 70), slice(75, 140)):
            assert torch.equal(dirty[name][:, tokens], clean[name][:, tokens]), name
        for tokens in outside:
            assert not dirty[name][:, tokens].any(), f"{name} outside all sequences"


def test_cu_seqlens_are_clamped(run):
    """Values outside [0, l] and decreasing ones mean what their running maximum in [0, l] means."""
    case = Case(b=1, l=100, p=5, n=3, cu_seqlens=(-5, 40, 30, 70, 500))
    inputs, gradients = make_inputs(case), make_gradients(case)
    wild = run(inputs, *gradients)
    inputs["cu_seqlens"] = torch.tensor([0, 40, 40, 70, 100], dtype=torch.int32)
    same_bits(run(inputs, *gradients), wild)


def test_no_sequence_at_all(run):
    case = Case(b=1, l=70, p=5, n=3, cu_seqlens=(9,), D="h")
    results = run(make_inputs(case), *make_gradients(case))
    assert results["final_states"].shape == (0, 6, 5, 3)
    for name, result in results.items():
        assert not result.any(), name


def test_strided_dy_is_copied(run):
    """The gradient of y.sum() has stride 0."""
    inputs = make_inputs(Case(p=5, n=3))
    check_inputs(run, inputs, torch.ones(()).expand_as(inputs["x"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_destinations(emulated, dtype):
    """Gradients land in slices of one projection's gradient, and nothing else of it is touched."""
    case = Case(l=65, p=16, n=16, z=True, D="h", dtype=dtype)
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    tensors, options = op_arguments(inputs)
    expected = emulated.ops.ssd_scan_backward(dy, d_final, *tensors, None, *options, ANY)
    widths = {"dz": 96, "dx": 96, "dB": 32, "dC": 32, "d_dt": 6, "rest": 2}
    projection = torch.full((2, 65, sum(widths.values())), 7.0, dtype=dtype)
    slices = dict(zip(widths, projection.split(list(widths.values()), dim=2)))
    views = {"dz": (6, 16), "dx": (6, 16), "dB": (2, 16), "dC": (2, 16), "d_dt": (6,)}
    into = {k: slices[k].unflatten(2, v) for k, v in views.items()}
    order = [into[k] for k in ("dx", "d_dt", "dB", "dC", "dz")]
    arguments = (dy, d_final, *tensors, None, *options, ANY, *order)
    results = emulated.ops.ssd_scan_backward_out(*arguments)
    names = ("dx", "d_dt", "dA", "dB", "dC", "dD", "dz", "d_dt_bias", "d_initial_states")
    for name, got, true in zip(names, results, expected):
        if name in into:
            assert got.numel() == 0, name
            assert torch.equal(into[name], true), name
        else:
            assert torch.equal(got, true), name
    assert (slices["rest"] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("l", [0, 1, 130])
def test_segment_state(emulated, dtype, l):
    case = Case(b=2, l=l, h=4, p=5, n=3, dtype=dtype, dt_bias=True)
    inputs, (_, d_state) = make_inputs(case), make_gradients(case)
    d_log_decay = torch.randn(2, 4, dtype=d_state.dtype)
    names = ("x", "dt", "A", "B", "dt_bias")
    tensors = [inputs[k] for k in names]
    options = (True, 0.0, math.inf, ANY)
    state, log_decay = emulated.ops.ssd_segment_state_forward(*tensors, *options)
    arguments = (d_state, d_log_decay, *tensors, *options)
    gradients = emulated.ops.ssd_segment_state_backward(*arguments)

    leaves = [t.double().requires_grad_() for t in tensors]
    true = reference.ssd_segment_state(*leaves[:4], dt_bias=leaves[4], dt_softplus=True)
    d_true = (d_state.double(), d_log_decay.double())
    nothing = 0 * sum(leaf.sum() for leaf in leaves)  # without tokens no state depends on them
    true = [t + nothing for t in true]
    d_leaves = torch.autograd.grad(true, leaves, d_true, materialize_grads=True)
    unit = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 5e-7}[dtype]
    rounding = 2**-8 if dtype == torch.bfloat16 else 0  # of dx, d_dt and dB, stored as x is
    named = zip(("state", "log_decay", *names), (state, log_decay, *gradients), (*true, *d_leaves))
    for name, got, expected in named:
        allowed = unit + (rounding if got.dtype == torch.bfloat16 else 0)
        error = (got.double() - expected).norm()
        assert got.shape == expected.shape
        assert error <= allowed * expected.norm(), f"{name}: {error / expected.norm():.1e}"


def test_wrong_shape_is_named(run):
    case = Case(b=2, l=7)
    inputs = make_inputs(case)
    inputs["B"] = inputs["B"][:, :6]
    with pytest.raises(
        RuntimeError, match=r"^ssd_scan: B must be \(b=2, l=7, .*got \(2, 6, 2, 16\)"
    ):
        run(inputs, *make_gradients(case))


@pytest.mark.parametrize("plan", [0, 2, 3, 1 << 8])
def test_any_takes_what_no_other_tier_takes(emulated, plan):
    """fp64, whatever tier is asked for."""
    case = Case(b=1, l=3, h=2, g=1, p=5, n=3, dtype=torch.float64)
    check(run_ops(emulated.ops, plan), case, repeat=False)
