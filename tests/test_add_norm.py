"""add_norm is a sum and a norm: values, gradients, what it writes, what it refuses."""

import math
from dataclasses import dataclass

import pytest
import torch
from layers import PRECISION

from mamba2_cuda._dtypes import DTYPE_CODE
from mamba2_cuda.ops import add_norm, add_norm_

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    b: int
    d: int
    residual: torch.dtype = F32
    x: torch.dtype | None = BF16
    weight: torch.dtype = BF16
    y: torch.dtype | None = None  # weight's
    wide: int = 8  # what lies between the rows, in elements


CASES = {
    "130m": Case(5, 768),
    "first layer": Case(3, 768, x=None),
    "fp16": Case(2, 132, x=F16, weight=F16),
    "two slabs": Case(2, 5120),
    "autocast": Case(21, 768, weight=F32, y=BF16),
    "autocast, 2 warps": Case(9, 1024, weight=F32, y=BF16),
    "autocast, 2.7b": Case(5, 2560, weight=F32, y=BF16),
    "autocast, 8 warps": Case(3, 3136, weight=F32, y=F16, x=F16),
    "autocast, first layer": Case(3, 768, x=None, weight=F32, y=BF16),
    "larger than a block": Case(2, 6148, weight=F32, y=BF16),
    "narrow": Case(300, 4, weight=F32, y=BF16),
    "odd": Case(3, 45, wide=3),
    "fp32": Case(20, 64, x=F32, weight=F32),
    "residual in bf16": Case(2, 64, residual=BF16),
    "mixed": Case(3, 64, x=F16, weight=F32, y=BF16),
    "fp64": Case(3, 20, F64, F64, F64),
    "no rows": Case(0, 64),
}


def normal(*shape, dtype, device="cpu", seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=F64).to(dtype).to(device)


def make_inputs(case, device="cpu"):
    def spaced(dtype, seed):  # NaN between the rows
        wide = torch.full((case.b, case.d + case.wide), math.nan, dtype=dtype, device=device)
        wide[:, : case.d] = normal(case.b, case.d, dtype=dtype, seed=seed)
        return wide[:, : case.d]

    x = None if case.x is None else spaced(case.x, 1)
    return spaced(case.residual, 0), x, normal(case.d, dtype=case.weight, device=device, seed=2)


def exact(residual, x, weight):
    """Both results in fp64; the sum is rounded, as if rounding had the derivative 1."""
    total = residual.double() if x is None else residual.double() + x.double()
    total = total + (total.to(residual.dtype).double() - total).detach()
    return total, total * (total.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


def working(case):
    return PRECISION[F64 if F64 in (case.residual, case.weight) else F32]


def assert_near(got, true, dtype, arithmetic):
    """got is true, rounded to dtype, after arithmetic that errs by so much of the whole."""
    assert got.dtype == dtype and got.shape == true.shape
    allowed = 1.2 * (true.to(dtype).double() - true).norm() + arithmetic * true.norm()
    assert (got.double() - true).norm() <= allowed


def check_in_place(case, function, residual, x, weight):
    before, true = residual.clone(), exact(residual, x, weight)
    y = function(residual, x, weight, eps=EPS, dtype=case.y)
    assert_near(residual, true[0], case.residual, 4 * working(case))
    assert_near(y, true[1], case.y or case.weight, 4 * working(case) * math.sqrt(case.d))
    assert residual._base[:, case.d :].isnan().all()
    again = before.clone()
    assert torch.equal(function(again, x, weight, eps=EPS, dtype=case.y), y)
    assert torch.equal(again, residual)


def public(residual, x, weight, dtype, d_residual_out, dy):
    """residual_out, y and the three gradients; some of them None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (residual, x, weight)]
    outputs = add_norm(*leaves, eps=EPS, dtype=dtype)
    wanted = [t for t in leaves if t is not None]
    pairs = [(o, d) for o, d in zip(outputs, (d_residual_out, dy)) if d is not None]
    gradients = iter(
        torch.autograd.grad([o for o, _ in pairs], wanted, [d for _, d in pairs], allow_unused=True)
    )
    return *outputs, *(None if t is None else next(gradients) for t in leaves)


def through(ops):
    """The same by the registered operators."""

    def run(residual, x, weight, dtype, d_residual_out, dy):
        code = DTYPE_CODE[dtype or weight.dtype]
        residual_out, y = ops.add_norm_forward(residual, x, weight, EPS, code)
        if x is None:
            assert residual_out.numel() == 0
            residual_out = residual
        x_dtype = -1 if x is None else DTYPE_CODE[x.dtype]
        d_residual, dx, dweight = ops.add_norm_backward(
            dy, d_residual_out, residual_out, weight, EPS, x_dtype
        )
        if x is None or x.dtype == residual.dtype:
            assert dx.numel() == 0
            dx = None if x is None else d_residual
        return residual_out, y, d_residual, dx, dweight

    return run


def check_gradients(case, run, residual, x, weight):
    shape = residual.shape
    d_residual_out = normal(*shape, dtype=case.residual, seed=3).to(residual.device)
    dy = normal(*shape, dtype=case.y or case.weight, seed=4).to(residual.device)
    if x is None:
        d_residual_out = None  # residual_out is residual itself
    arguments = (residual, x, weight, case.y, d_residual_out, dy)
    residual_out, y, d_residual, dx, dweight = results = run(*arguments)
    leaves = [t.double().detach().requires_grad_() for t in (residual, weight)]
    total = residual if x is None else (residual.double() + x.double()).to(case.residual)
    true_out, true_y = exact(leaves[0] + (total.double() - leaves[0]).detach(), None, leaves[1])
    d_true_out = torch.zeros_like(true_out) if x is None else d_residual_out.double()
    true_d, true_dweight = torch.autograd.grad(
        [true_out, true_y], leaves, [d_true_out, dy.double()]
    )
    arithmetic = 4 * working(case) * math.sqrt(case.d + case.b)
    assert_near(residual_out, true_out.detach(), case.residual, arithmetic)
    assert_near(y, true_y.detach(), case.y or case.weight, arithmetic)
    assert_near(d_residual, true_d, case.residual, arithmetic)
    if x is not None:
        assert_near(dx, true_d, case.x, arithmetic)
    assert_near(dweight, true_dweight, dweight.dtype, arithmetic)
    for first, second in zip(results, run(*arguments)):
        assert first is second is None or torch.equal(first, second)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_in_place(case, device):
    check_in_place(case, add_norm_, *make_inputs(case, device))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case, device, nan_filled):
    check_gradients(case, public, *make_inputs(case, device))


@pytest.mark.gpu
@pytest.mark.parametrize("d", [768, 2560])
def test_many_rows(d, cuda, nan_filled):
    case = Case(5003, d, weight=F32, y=BF16)
    check_gradients(case, public, *make_inputs(case, cuda))
    check_in_place(case, add_norm_, *make_inputs(case, cuda))


@pytest.mark.parametrize("added", [True, False])
def test_gradcheck(added, device):
    shapes = ((2, 3, 6), (2, 3, 6), (6,))
    inputs = [normal(*s, dtype=F64, device=device, seed=i) for i, s in enumerate(shapes)]
    for leaf in inputs:
        leaf.requires_grad_()
    inputs[1] = inputs[1] if added else None
    assert torch.autograd.gradcheck(lambda *leaves: add_norm(*leaves, eps=EPS), inputs)


@pytest.mark.parametrize("used", ["residual_out", "y"])
def test_one_output_alone(used, device):
    residual, x = (normal(4, 8, dtype=F32, device=device, seed=i) for i in (0, 1))
    weight = normal(8, dtype=F32, device=device, seed=2)
    d = normal(4, 8, dtype=F32, device=device, seed=3)
    given = (d, None) if used == "residual_out" else (None, d)
    *_, d_residual, dx, dweight = public(residual, x, weight, None, *given)
    zeros = torch.zeros_like(d)
    both = public(residual, x, weight, None, *(zeros if g is None else g for g in given))
    assert torch.equal(d_residual, both[2]) and torch.equal(dx, both[3])
    assert torch.equal(dweight, both[4])


def test_gradient_of_a_sum(device):
    """Its stride is 0."""
    residual, x = (normal(4, 8, dtype=F64, device=device, seed=i) for i in (0, 1))
    weight = normal(8, dtype=F64, device=device, seed=2)
    ones = torch.ones((), dtype=F64, device=device).expand(4, 8)
    got = public(residual, x, weight, None, ones, ones)
    expected = public(residual, x, weight, None, ones.contiguous(), ones.contiguous())
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["autocast", "autocast, first layer", "fp64"])
def test_compile(name, device):
    case = CASES[name]
    residual, x, weight = make_inputs(case, device)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (residual, x, weight)]

    def losses(function):
        residual_out, y = function(*leaves, eps=EPS, dtype=case.y)
        loss = residual_out.square().sum() + y.double().square().sum()
        return loss, *torch.autograd.grad(loss, [t for t in leaves if t is not None])

    compiled = torch.compile(add_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(losses(compiled), losses(add_norm), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["130m", "first layer", "mixed", "fp64"])
def test_opcheck(name, device, ops):
    case = CASES[name]
    residual, x, weight = make_inputs(case, device)
    codes = DTYPE_CODE[case.y or case.weight], -1 if x is None else DTYPE_CODE[case.x]
    arguments = (residual, x, weight, EPS, codes[0])
    torch.library.opcheck(ops.add_norm_.default, arguments)
    torch.library.opcheck(ops.add_norm_forward.default, arguments)
    dy = torch.ones_like(residual, dtype=case.y or case.weight)
    passed = None if x is None else torch.ones_like(residual)
    arguments = (dy, passed, residual, weight, EPS, codes[1])
    torch.library.opcheck(ops.add_norm_backward.default, arguments)


def test_second_differentiation_is_refused(device):
    residual = torch.randn(3, 8, device=device, requires_grad=True)
    _, y = add_norm(residual, torch.randn(3, 8, device=device), torch.randn(8, device=device))
    (d_residual,) = torch.autograd.grad(y.square().sum(), residual, create_graph=True)
    with pytest.raises(RuntimeError, match="a second differentiation is not implemented"):
        d_residual.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.ones(2, 8)), r"x must be \(3, 8\), got \(2, 8\)"),
        (dict(weight=torch.ones(7)), r"weight must be \(d=8,\), got \(7,\)"),
        (dict(residual=torch.ones(3, 8).int()), "residual must be"),
    ],
)
def test_refusals(change, message):
    inputs = dict(residual=torch.ones(3, 8), x=torch.ones(3, 8), weight=torch.ones(8)) | change
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"add_norm: {message}"):
        add_norm(**inputs)
    with pytest.raises(RuntimeError, match=f"add_norm_: {message}"):
        add_norm_(**inputs)


def test_in_place_wants_channels_side_by_side():
    with pytest.raises(RuntimeError, match="add_norm_: residual's last stride must be 1, got 3"):
        add_norm_(torch.ones(8, 3).T, None, torch.ones(8))
