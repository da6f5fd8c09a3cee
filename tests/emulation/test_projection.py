"""The CUDA kernels of norm_linear, norm_linear_add_norm_ and linear_rows on the emulated card."""

import pytest
import test_norm_linear_add_norm as with_norm
import torch
from test_norm_linear import (
    CASES,
    CONVOLVED,
    MANY_ROWS,
    Case,
    check,
    check_convolved,
    check_linear_rows,
    make_inputs,
)

from mamba2_cuda._dtypes import DTYPE_CODE


def through(ops):
    """The public function's signature over the emulated operator."""

    def norm_linear(
        x, norm_weight, weight, bias=None, *, z=None, residual=None, group_size=None,
        norm_before_gate=False, early_weights=False,
    ):  # fmt: skip
        y = ops.norm_linear(
            x, norm_weight, z, weight, bias, residual, 1e-5, group_size or x.size(1),
            norm_before_gate, early_weights,
        )  # fmt: skip
        return y if residual is None else residual

    return norm_linear


@pytest.mark.parametrize("name", CASES)
def test_values(emulated, name, nan_filled):
    check(CASES[name], through(emulated.ops), make_inputs(CASES[name]))


@pytest.mark.parametrize("timing, blocks", [("early", 1), ("late", 6)])
def test_bits_do_not_depend_on_the_schedule(emulated, timing, blocks):
    inputs = make_inputs(CASES["31 rows"])
    first = through(emulated.ops)(**inputs)
    emulated.schedule(seed=11, timing=timing, blocks=blocks)
    assert torch.equal(through(emulated.ops)(**inputs), first)


def with_norm_through(ops):
    def norm_linear_add_norm_(
        residual, x, norm_weight, weight, bias=None, *, next_weight, z=None, group_size=None,
        norm_before_gate=False, next_eps=1e-5, early_weights=False,
    ):  # fmt: skip
        return ops.norm_linear_add_norm_(
            residual, x, norm_weight, z, weight, bias, next_weight, 1e-5, group_size or x.size(1),
            norm_before_gate, next_eps, DTYPE_CODE[next_weight.dtype], early_weights,
        )  # fmt: skip

    return norm_linear_add_norm_


@pytest.mark.parametrize("name", with_norm.CASES)
def test_values_with_the_next_norm(emulated, name, nan_filled):
    case = with_norm.CASES[name]
    with_norm.check(case, with_norm_through(emulated.ops), with_norm.make_more_inputs(case))


def test_rows_apart_with_the_next_norm(emulated):
    with_norm.check_rows_apart(with_norm_through(emulated.ops))


@pytest.mark.parametrize("timing, blocks", [("early", 1), ("late", 6)])
def test_bits_with_the_next_norm_do_not_depend_on_the_schedule(emulated, timing, blocks):
    run = with_norm_through(emulated.ops)
    case = with_norm.CASES["more chunks than stages"]
    first = run(**with_norm.make_more_inputs(case))
    emulated.schedule(seed=11, timing=timing, blocks=blocks)
    assert torch.equal(run(**with_norm.make_more_inputs(case)), first)


def linear_rows_through(ops):
    def linear_rows(
        x, weight, *, conv_state=None, conv_weight=None, conv_bias=None, conv_first=0, silu=True,
        early_weights=False,
    ):  # fmt: skip
        conv = (conv_state, conv_weight, conv_bias, conv_first, silu)
        return ops.linear_rows(x, weight, *conv, early_weights)

    return linear_rows


@pytest.mark.parametrize("sizes", MANY_ROWS.values(), ids=MANY_ROWS)
def test_linear_rows(emulated, sizes, nan_filled):
    check_linear_rows(linear_rows_through(emulated.ops), *sizes)


@pytest.mark.parametrize("sizes", CONVOLVED.values(), ids=CONVOLVED)
def test_linear_rows_and_a_convolution(emulated, sizes, nan_filled):
    check_convolved(linear_rows_through(emulated.ops), *sizes)


@pytest.mark.parametrize("name", ["130m", "more chunks than stages"])
def test_linear_rows_on_a_card_with_less_shared_memory(emulated, name):
    """A shorter ring, and the same bits."""
    b, d, o = MANY_ROWS[name]
    inputs = make_inputs(Case(b, d, o, x_dtype=torch.bfloat16))
    run, arguments = linear_rows_through(emulated.ops), (inputs["x"], inputs["weight"])
    y = run(*arguments)
    emulated.schedule(max_smem_bytes=99 << 10)
    assert torch.equal(run(*arguments), y)
