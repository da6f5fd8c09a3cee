"""norm_linear_add_norm_ is norm_linear with a residual and the residual's norm: values, what it
writes, what it refuses."""

from dataclasses import replace

import pytest
import torch
from layers import PRECISION
from test_norm_linear import BF16, F16, F32, F64, Case, make_inputs, normed_rows

from mamba2_cuda import reference
from mamba2_cuda._dtypes import DTYPE_CODE
from mamba2_cuda.ops import norm_linear_add_norm_

NEXT_EPS = 1e-3

# What the kernels for many rows take; then what norm_linear and add_norm_ take one by one.
FAST = dict(x_dtype=BF16, residual=F32, norm_weight=BF16)
CASES = {
    "130m": Case(64, 1536, 768, z=True, **FAST),
    "gate outside": Case(9, 256, 80, z=True, norm_before_gate=True, **FAST),
    "no gate, 2 tiles of rows": Case(70, 136, 64, **FAST),
    "more chunks than stages": Case(3, 2632, 68, z=True, **FAST),
    "one row, 2 slabs": Case(1, 64, 4104, z=True, **FAST),
    "fp32 norm weight": Case(10, 64, 16, x_dtype=BF16, residual=F32),
    "bias": Case(10, 64, 16, bias=True, **FAST),
    "fp32 row": Case(10, 64, 16, residual=F32),
    "fp16": Case(10, 64, 16, F16, F16, z=True, residual=F32),
    "groups": Case(10, 96, 72, z=True, group_size=32, **FAST),
    "residual in bf16": Case(10, 64, 16, x_dtype=BF16, residual=BF16),
    "odd": Case(10, 45, 17, **FAST),
    "fp64": Case(3, 50, 20, F64, F64, z=True, residual=F64),
    "no rows": Case(0, 64, 16, **FAST),
}


def make_more_inputs(case, device="cpu"):
    inputs = make_inputs(case, device)
    random = torch.Generator().manual_seed(1)
    next_weight = torch.randn(case.o, generator=random, dtype=F64)
    return {**inputs, "next_weight": next_weight.to(case.dtype).to(device)}


def expected(case, inputs):
    """The product, the residual with it, and its norm, in fp64 without rounding."""
    exact = {k: v.double() for k, v in inputs.items()}
    product = normed_rows(case, exact) @ exact["weight"].T + exact.get("bias", 0)
    residual = exact["residual"] + product
    y = reference.gated_rmsnorm(residual, exact["next_weight"], eps=NEXT_EPS)
    return product, residual, y


def check(case, function, inputs):
    """Its error: that of the product, whose left operand is rounded (by 0.84 PRECISION of it, root
    mean square), of fp32 sums, and of each result's rounding."""
    product, residual, y = expected(case, inputs)
    kept = {k: v.clone() for k, v in inputs.items()}
    options = dict(
        group_size=case.group_size, norm_before_gate=case.norm_before_gate, next_eps=NEXT_EPS
    )
    got = function(**inputs, **options, early_weights=True)
    working = PRECISION[F64 if case.dtype == F64 else F32]
    sums = 4 * working * (case.d + case.o) ** 0.5
    of_product = (1.2 * PRECISION[case.dtype] + sums) * product.norm()
    relative = of_product / residual.norm() if case.b else 0

    def assert_near(got, true, allowed):
        allowed = allowed + 1.2 * (true.to(got.dtype).double() - true).norm()
        assert (got.double() - true).norm() <= allowed

    assert got.dtype == case.dtype and got.shape == y.shape
    assert_near(inputs["residual"], residual, of_product + sums * residual.norm())
    of_y = PRECISION[case.residual] if case.residual == BF16 else 0  # it is of the rounded sum
    assert_near(got, y, (relative + of_y + sums) * 1.2 * y.norm())
    wide = inputs["residual"]._base
    assert wide[:, case.o :].isnan().all()
    after = inputs["residual"].clone()
    inputs["residual"].copy_(kept["residual"])
    assert torch.equal(function(**inputs, **options), got), "repeated"
    assert torch.equal(inputs["residual"], after)
    assert all(torch.equal(v, kept[k]) for k, v in inputs.items() if k != "residual")
    return got


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case, device, nan_filled):
    check(case, norm_linear_add_norm_, make_more_inputs(case, device))


@pytest.mark.parametrize("name", ["130m", "fp64"])
def test_opcheck(name, device, ops):
    case = CASES[name]
    inputs = make_more_inputs(case, device)
    order = ("residual", "x", "norm_weight", "z", "weight", "bias", "next_weight")
    arguments = (*(inputs.get(k) for k in order), 1e-5, case.d, False, 1e-5)
    torch.library.opcheck(
        ops.norm_linear_add_norm_.default, (*arguments, DTYPE_CODE[case.dtype], False)
    )


def check_rows_apart(function, device="cpu"):
    case = replace(CASES["130m"], b=100, d=264, o=96)
    inputs = make_more_inputs(case, device)
    before = inputs["residual"].clone()
    y = function(**inputs)
    for rows in (slice(0, 1), slice(5, 13), slice(60, 100)):
        few = {k: inputs[k][rows] for k in ("x", "z")} | {"residual": before[rows].clone()}
        assert torch.equal(function(**{**inputs, **few}), y[rows])
        assert torch.equal(few["residual"], inputs["residual"][rows])


def test_a_rows_result_does_not_depend_on_the_others(device):
    check_rows_apart(norm_linear_add_norm_, device)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(z=torch.ones(2, 8)), r"norm_linear: z must be \(b=3, d=8\), got \(2, 8\)"),
        (dict(residual=torch.ones(3, 4)), r"norm_linear: residual must be \(b=3, o=5\)"),
        (dict(next_weight=torch.ones(6)), r"add_norm_: weight must be \(d=5,\), got \(6,\)"),
    ],
)
def test_refusals(change, message):
    inputs = dict(
        residual=torch.ones(3, 5), x=torch.ones(3, 8), norm_weight=torch.ones(8),
        weight=torch.ones(5, 8), next_weight=torch.ones(5),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        norm_linear_add_norm_(**{**inputs, **change})
