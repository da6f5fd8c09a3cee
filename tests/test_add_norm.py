"""add_norm is a sum and a norm: values, what it writes, what it refuses."""

import math
from dataclasses import dataclass

import pytest
import torch
from layers import PRECISION

from mamba2_cuda.ops import add_norm

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    b: int
    d: int
    residual: torch.dtype = F32
    x: torch.dtype | None = BF16
    weight: torch.dtype = BF16
    wide: int = 8  # what lies between the rows, in elements


CASES = {
    "130m": Case(5, 768),
    "first layer": Case(3, 768, x=None),
    "fp16": Case(2, 132, x=F16, weight=F16),
    "two slabs": Case(2, 5120),
    "odd": Case(3, 45, wide=3),
    "fp32": Case(2, 64, x=F32, weight=F32),
    "residual in bf16": Case(2, 64, residual=BF16),
    "fp64": Case(3, 20, F64, F64, F64),
    "no rows": Case(0, 64),
}


def make_inputs(case, device="cpu"):
    random = torch.Generator().manual_seed(0)

    def normal(*shape, dtype):
        return torch.randn(*shape, generator=random, dtype=F64).to(dtype).to(device)

    def spaced(dtype):  # NaN between the rows
        wide = torch.full((case.b, case.d + case.wide), math.nan, dtype=dtype, device=device)
        wide[:, : case.d] = normal(case.b, case.d, dtype=dtype)
        return wide[:, : case.d]

    x = None if case.x is None else spaced(case.x)
    return spaced(case.residual), x, normal(case.d, dtype=case.weight)


def check(case, function, residual, x, weight):
    total = residual.double() + (0 if x is None else x.double())
    rounded = total.to(case.residual)
    exact = rounded.double()
    true = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    before = residual.clone()
    y = function(residual, x, weight, eps=1e-5)
    assert y.dtype == case.weight and y.shape == residual.shape
    working = PRECISION[F64 if F64 in (case.residual, case.weight) else F32]
    assert (residual.double() - total).norm() <= (
        (rounded.double() - total).norm() + 4 * working * total.norm()
    )
    allowed = 1.2 * (true.to(y.dtype).double() - true).norm()
    allowed += 4 * working * math.sqrt(case.d) * true.norm()
    assert (y.double() - true).norm() <= allowed
    assert residual._base[:, case.d :].isnan().all()
    again = before.clone()
    assert torch.equal(function(again, x, weight, eps=1e-5), y) and torch.equal(again, residual)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case, device):
    check(case, add_norm, *make_inputs(case, device))


@pytest.mark.parametrize("name", ["130m", "first layer", "fp64"])
def test_opcheck(name, device, ops):
    torch.library.opcheck(ops.add_norm.default, (*make_inputs(CASES[name], device), 1e-5))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.ones(2, 8)), r"x must be \(b=3, d=8\), got \(2, 8\)"),
        (dict(weight=torch.ones(7)), r"weight must be \(d=8,\), got \(7,\)"),
        (dict(residual=torch.ones(8, 3).T), r"residual's last stride must be 1, got 3"),
    ],
)
def test_refusals(change, message):
    inputs = dict(residual=torch.ones(3, 8), x=torch.ones(3, 8), weight=torch.ones(8))
    with pytest.raises(RuntimeError, match=f"add_norm: {message}"):
        add_norm(**{**inputs, **change})
