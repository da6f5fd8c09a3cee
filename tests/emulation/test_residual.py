"""add_norm's CUDA kernels on the emulated card."""

import pytest
import torch
from test_add_norm import (
    BF16,
    CASES,
    DTYPE_CODE,
    F32,
    Case,
    check_gradients,
    check_in_place,
    make_inputs,
    through,
)

MORE = {
    "many rows": Case(2100, 16, weight=F32, y=BF16),
    "many rows, fp32": Case(540, 776, x=F32, weight=F32, wide=4),
}
ALL = CASES | MORE


@pytest.mark.parametrize("name", ALL)
def test_in_place(emulated, name, nan_filled):
    def add_norm_(residual, x, weight, *, eps, dtype):
        return emulated.ops.add_norm_(residual, x, weight, eps, DTYPE_CODE[dtype or weight.dtype])

    check_in_place(ALL[name], add_norm_, *make_inputs(ALL[name]))


@pytest.mark.parametrize("name", ALL)
def test_values_and_gradients(emulated, name, nan_filled):
    check_gradients(ALL[name], through(emulated.ops), *make_inputs(ALL[name]))


@pytest.mark.parametrize("timing, blocks", [("early", 1), ("late", 6)])
def test_bits_do_not_depend_on_the_schedule(emulated, timing, blocks):
    case = Case(600, 1024, weight=F32, y=BF16)
    residual, x, weight = make_inputs(case)
    arguments = (residual, x, weight, BF16, torch.ones_like(residual), torch.ones_like(x))
    first = through(emulated.ops)(*arguments)
    emulated.schedule(seed=11, timing=timing, blocks=blocks)
    second = through(emulated.ops)(*arguments)
    assert all(torch.equal(*pair) for pair in zip(first, second))
