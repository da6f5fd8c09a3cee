"""The kernels around dt, whose tiles have 16 heads: heads that fill one and part of another, heads
of dt that share a word or lie apart, with the same bits."""

import pytest
import torch
from cases import Case, make_gradients, make_inputs
from common import RESULTS, check, op_arguments, run_ops

SM80, SM90 = 2, 3
TIERS = {"sm80": SM80, "sm90": SM90}
BASE = dict(b=1, l=150, h=22, p=32, g=1, n=64, D="h", dt_bias=True)
CASES = {
    "two tiles": dict(dtype=torch.bfloat16, seed=1),
    "an odd head, fp16": dict(dtype=torch.float16, h=19, b=2, l=70, seed=2),
    "fp32 dt": dict(dtype=torch.bfloat16, dt_dtype=torch.float32, h=18, seed=3),
    "fp64 dt, limits": dict(
        dtype=torch.bfloat16, dt_dtype=torch.float64, h=17, dt_limit=(0.05, 0.12), seed=4
    ),
    "no softplus, limits": dict(
        dtype=torch.bfloat16, dt_softplus=False, dt_limit=(0.07, 0.12), seed=5
    ),
    "packed": dict(dtype=torch.bfloat16, l=300, cu_seqlens=(3, 70, 70, 230, 290), seed=6),
    "resets": dict(dtype=torch.bfloat16, seq_idx=True, initial_states="working", seed=7),
}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", CASES)
def test_more_heads_than_a_tile(emulated, name, tier):
    emulated.schedule(seed=len(name), sms=4)
    check(run_ops(emulated.ops, plan=TIERS[tier]), Case(**BASE | CASES[name]))


def apart(dt):
    """The same numbers, where no two heads are an aligned word; NaN between them."""
    rows = torch.full((*dt.shape[:2], dt.shape[2] + 3), float("nan"), dtype=dt.dtype)
    rows[..., 1:-2] = dt
    return rows[..., 1:-2]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_words_of_two_heads(emulated, dtype, tier):
    """dt and d_dt of two heads are one word where they can be: that changes no bit."""
    case = Case(**BASE | dict(dtype=dtype, seed=8))
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    assert inputs["dt"].stride(1) % 2 == 0

    def gradients(dt):
        tensors, options = op_arguments(inputs | {"dt": dt})
        given = (dy, d_final, *tensors, None, *options, TIERS[tier])
        return dict(zip(RESULTS[2:], emulated.ops.ssd_scan_backward(*given)))

    words, single = gradients(inputs["dt"]), gradients(apart(inputs["dt"]))
    assert words["d_dt"].stride(1) % 2 == 0
    for name, gradient in words.items():
        assert torch.equal(gradient, single[name]), name
