"""The comparison itself: it takes what is as good as the yardstick and refuses what is not."""

import itertools
import math

import pytest
import torch
from cases import FACTORS, Case, make_gradients, make_inputs, pairwise
from common import check, compare, confidence, expected_error, run_public, to_double, truth

from mamba2_cuda import reference
from mamba2_cuda.reference.yardstick import yardstick

HALF_CASE = Case(
    l=100, dtype=torch.bfloat16, D="hp", z=True, dt_bias=True, initial_states="working"
)


def test_pairwise_covers_every_pair():
    rows = list(pairwise())
    for (k1, values1), (k2, values2) in itertools.combinations(FACTORS.items(), 2):
        met = {(row[k1], row[k2]) for row in rows}
        excluded = {(3, 2), (2, 3)} if {k1, k2} == {"h", "g"} else set()
        assert set(itertools.product(values1, values2)) - excluded == met, f"{k1}, {k2}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_reference_passes(dtype):
    run = run_public(lambda save_states=False, **kw: reference.ssd_scan(**kw))
    check(run, Case(**{**vars(HALF_CASE), "dtype": dtype}))


@pytest.mark.parametrize("chunk", [32, 128])
def test_other_chunk_length_passes(chunk):
    inputs, (dy, d_final) = make_inputs(HALF_CASE), make_gradients(HALF_CASE)
    results = yardstick(inputs, dy, d_final, operand=torch.bfloat16, chunk=chunk)
    compare(results, truth(HALF_CASE), expected_error(HALF_CASE), inputs)


@pytest.mark.parametrize("h", [1, 5])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_confidence_covers_other_draws(tokens, h):
    """Roundings drawn anew, by scaling what is rounded, do not differ by more than it says."""
    case = Case(b=1, l=tokens, h=h, p=64, g=1, n=256, dtype=torch.bfloat16)
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    generator = torch.Generator().manual_seed(1)
    logs = {name: [] for name in ("y", "dx", "dB", "dC")}
    said = {name: [] for name in logs}
    for _ in range(32):
        scale = dict(zip("xBC", 1 + torch.rand(3, dtype=torch.float64, generator=generator)))
        drawn = {k: to_double(v) * scale.get(k, 1) for k, v in inputs.items() if torch.is_tensor(v)}
        drawn = {**inputs, **drawn}
        exact, rounded = (yardstick(drawn, dy, d_final, operand=o) for o in (None, case.dtype))
        for name in logs:
            error = rounded[name].to(case.dtype).double() - exact[name]
            logs[name].append((error.norm() / exact[name].norm()).log())
            said[name].append(math.log(confidence(name, error, tokens)) / 3)
    for name in logs:
        spread, allowed = torch.stack(logs[name]).std().item(), sum(said[name]) / len(said[name])
        assert spread <= 1.2 * allowed, f"{name}: {spread:.3f}, {allowed:.3f}"


def test_double_rounding_is_refused():
    """Operands rounded to 8 bits of fraction where 11 were given."""
    case = Case(**{**vars(HALF_CASE), "dtype": torch.float16})
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    results = yardstick(inputs, dy, d_final, operand=torch.bfloat16)
    with pytest.raises(AssertionError, match="too far") as refused:
        compare(results, truth(case), expected_error(case), inputs)
    for name in ("y", "final_states", "dx", "dB", "dC", "dz", "d_initial_states"):
        assert f"<-- {name} too far" in str(refused.value)


@pytest.mark.parametrize("name", ["y", "final_states", "dx", "d_dt", "dA", "dB", "dC", "dD", "dz"])
@pytest.mark.parametrize("fault", ["nan", "a head", "a token", "2 percent"])
def test_faults_are_refused(name, fault):
    inputs, (dy, d_final) = make_inputs(HALF_CASE), make_gradients(HALF_CASE)
    results = yardstick(inputs, dy, d_final, operand=torch.bfloat16)
    result = results[name]
    if fault == "nan":
        result.view(-1)[-1] = torch.nan
    elif fault == "2 percent":
        result *= 1.02
    else:
        result.select(0 if result.dim() == 1 or fault == "a token" else 1, -1).zero_()
    few = name in ("d_dt", "dA")  # allowed to differ by more: test_numerics.py pools these
    if few and fault == "2 percent":
        result *= 1.2
    with pytest.raises(AssertionError, match=f"<-- {name} too far"):
        compare(results, truth(HALF_CASE), expected_error(HALF_CASE), inputs)
