"""norm_linear is gated_rmsnorm and a projection: values, what it writes, what it refuses."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from layers import PRECISION

from mamba2_cuda import reference
from mamba2_cuda.ops import linear_rows, linear_rows_at_once, norm_linear

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    b: int
    d: int
    o: int
    dtype: torch.dtype = BF16
    x_dtype: torch.dtype = F32
    z: bool = False
    bias: bool = False
    residual: torch.dtype | None = None
    group_size: int | None = None
    norm_before_gate: bool = False
    norm_weight: torch.dtype = F32


# The layers of small models, and what else the tensor-core kernel takes; then what any takes.
CASES = {
    "in_proj": Case(1, 768, 210),
    "out_proj": Case(3, 1536, 48, x_dtype=BF16, z=True, residual=F32),
    "gate outside": Case(8, 256, 16, x_dtype=BF16, z=True, norm_before_gate=True),
    "9 rows": Case(9, 96, 40, F16, F16, z=True, residual=F16, bias=True),
    "31 rows": Case(31, 264, 17, bias=True),
    "two slabs": Case(2, 2056, 33, x_dtype=BF16, z=True, norm_before_gate=True),
    "three slabs": Case(10, 5120, 20, x_dtype=BF16, z=True, residual=F32),
    "too wide": Case(2, 8192, 16),
    "groups": Case(2, 96, 70, x_dtype=BF16, z=True, group_size=32),
    "odd d": Case(2, 45, 70, residual=BF16, bias=True),
    "fp32": Case(3, 64, 70, F32, z=True, bias=True),
    "fp64": Case(3, 50, 20, F64, F64, z=True, residual=F64),
    "no rows": Case(0, 64, 16),
}


def make_inputs(case, device="cpu"):
    """x, z and residual as slices of wider tensors, NaN around them."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape, dtype, wide=0):
        values = torch.randn(*shape, generator=random, dtype=F64).to(dtype)
        if wide:
            around = torch.full((shape[0], shape[1] + wide), math.nan, dtype=dtype, device=device)
            around[:, : shape[1]] = values
            return around[:, : shape[1]]
        return values.to(device)

    b, d, o = case.b, case.d, case.o
    inputs = {
        "x": normal(b, d, dtype=case.x_dtype, wide=16),
        "norm_weight": normal(d, dtype=case.norm_weight),
        "weight": normal(o, d, dtype=case.dtype),
    }
    if case.z:
        inputs["z"] = normal(b, d, dtype=case.x_dtype, wide=8)
    if case.bias:
        inputs["bias"] = normal(o, dtype=case.dtype)
    if case.residual:
        inputs["residual"] = normal(b, o, dtype=case.residual, wide=8)
    return inputs


def normed_rows(case, exact):
    """What the projection is of."""
    return reference.gated_rmsnorm(
        exact["x"], exact["norm_weight"], exact.get("z"), group_size=case.group_size,
        norm_before_gate=case.norm_before_gate,
    )  # fmt: skip


def expected(case, inputs):
    """In fp64, but for the normed row, which is rounded to weight's dtype."""
    exact = {k: v.double() for k, v in inputs.items()}
    y = normed_rows(case, exact).to(case.dtype).double() @ exact["weight"].T
    return sum((exact[k] for k in ("bias", "residual") if k in inputs), y)


def check(case, function, inputs):
    """Its error: the result's rounding, that of fp32 sums of d terms, and rows rounded otherwise
    than the truth's where that lies between two numbers of their dtype."""
    true = expected(case, inputs)
    kept = {k: v.clone() for k, v in inputs.items()}
    options = dict(group_size=case.group_size, norm_before_gate=case.norm_before_gate)
    got = function(**inputs, **options, early_weights=True)
    assert got.shape == true.shape and got.dtype == (case.residual or case.dtype)
    again = function(**{**inputs, "residual": kept.get("residual")}, **options)
    assert torch.equal(got, again), "repeated"
    working = PRECISION[F64 if case.dtype == F64 else F32]
    allowed = 1.2 * (true.to(got.dtype).double() - true).norm()
    allowed += (4 * working * math.sqrt(case.d) + PRECISION[case.dtype] / 16) * true.norm()
    assert (got.double() - true).norm() <= allowed
    if case.residual:
        wide = inputs["residual"]._base
        assert torch.equal(wide[:, : case.o], got) and wide[:, case.o :].isnan().all()
    assert all(torch.equal(v, kept[k]) for k, v in inputs.items() if k != "residual")
    return got


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case, device):
    check(case, norm_linear, make_inputs(case, device))


@pytest.mark.parametrize("name", ["in_proj", "31 rows", "fp64"])
def test_opcheck(name, device, ops):
    inputs = make_inputs(CASES[name], device)
    order = ("x", "norm_weight", "z", "weight", "bias", "residual")
    arguments = (*(inputs.get(k) for k in order), 1e-5, CASES[name].d, False, False)
    torch.library.opcheck(ops.norm_linear.default, arguments)


def test_a_rows_result_does_not_depend_on_the_others(device):
    case = replace(CASES["in_proj"], b=40)
    inputs = make_inputs(case, device)
    many = norm_linear(**inputs)
    for rows in (slice(0, 1), slice(5, 13), slice(20, 40)):
        few = norm_linear(**{**inputs, "x": inputs["x"][rows]})
        assert torch.equal(few, many[rows])


# b, d, o
MANY_ROWS = {
    "130m": (64, 768, 3352),
    "two tiles of rows": (65, 136, 40),
    "more chunks than stages": (5, 1032, 24),
    "least": (1, 8, 8),
    "no rows": (0, 64, 16),
}


def check_linear_rows(function, b, d, o, device="cpu"):
    inputs = make_inputs(Case(b, d, o, x_dtype=BF16), device)
    x, weight = inputs["x"], inputs["weight"]
    y, true = function(x, weight, early_weights=True), x.double() @ weight.double().T
    assert y.dtype == BF16 and torch.equal(function(x, weight, early_weights=False), y)
    allowed = 1.2 * (true.to(BF16).double() - true).norm()
    allowed += 4 * PRECISION[F32] * math.sqrt(d) * true.norm()
    assert (y.double() - true).norm() <= allowed
    for rows in (slice(0, 1), slice(3, b)):
        assert torch.equal(function(x[rows], weight, early_weights=False), y[rows])


# b, d, o, and of the convolution: width, channels, first, bias, silu
CONVOLVED = {
    "130m": (64, 768, 3352, 4, 1792, 1536, True, True),
    "all outputs": (3, 8, 8, 2, 8, 0, False, False),
    "across tiles": (66, 16, 104, 3, 70, 18, True, False),
    "no rows": (0, 64, 16, 4, 6, 2, True, True),
}


def convolution(b, o, width, channels, first, bias, silu, device="cpu"):
    """Its arguments; between the rows of the state there is NaN."""
    random = torch.Generator().manual_seed(2)
    around = torch.full((b, width * channels), math.nan, dtype=BF16)
    state = around[:, : (width - 1) * channels].unflatten(1, (width - 1, channels))
    state.copy_(torch.randn(state.shape, generator=random))
    weight = torch.randn(channels, width, generator=random)
    return dict(
        conv_state=around.to(device)[:, : (width - 1) * channels].unflatten(1, state.shape[1:]),
        conv_weight=weight.to(device, BF16),
        conv_bias=torch.randn(channels, generator=random).to(device, BF16) if bias else None,
        conv_first=first,
        silu=silu,
    )


def check_convolved(function, b, d, o, *sizes, device="cpu"):
    inputs = make_inputs(Case(b, d, o, x_dtype=BF16), device)
    x, weight, conv = inputs["x"], inputs["weight"], convolution(b, o, *sizes, device=device)
    before = conv["conv_state"].clone()
    y, product = function(x, weight, **conv, early_weights=True), function(x, weight)
    first, end = sizes[2], sizes[1] + sizes[2]
    assert torch.equal(y[:, :first], product[:, :first])
    assert torch.equal(y[:, end:], product[:, end:])
    seen = torch.cat([before, product[:, None, first:end]], 1)
    assert torch.equal(conv["conv_state"], seen[:, 1:])
    true = (seen.double() * conv["conv_weight"].double().T).sum(1)
    true = true + (0 if conv["conv_bias"] is None else conv["conv_bias"].double())
    true = torch.nn.functional.silu(true) if conv["silu"] else true
    allowed = 1.2 * (true.to(BF16).double() - true).norm() + 8 * PRECISION[F32] * true.norm()
    assert (y[:, first:end].double() - true).norm() <= allowed
    conv["conv_state"].copy_(before)
    assert torch.equal(function(x, weight, **conv), y), "repeated"
    assert conv["conv_state"]._base is None or b == 0 or conv["conv_state"]._base.isnan().any()


@pytest.mark.parametrize("sizes", MANY_ROWS.values(), ids=MANY_ROWS)
def test_linear_rows(sizes, device, ops, nan_filled):
    check_linear_rows(linear_rows, *sizes, device)
    b, d, o = sizes
    x, weight = (torch.ones(*s, d, device=device, dtype=BF16) for s in ((b,), (o,)))
    arguments = (x, weight, None, None, None, 0, False, False)
    torch.library.opcheck(ops.linear_rows.default, arguments)


def test_linear_rows_at_once():
    """132 SMs, a block of 64 rows and 32 outputs on each."""
    assert linear_rows_at_once(64, 132 * 32) and linear_rows_at_once(128, 66 * 32)
    assert not (linear_rows_at_once(65, 132 * 32) or linear_rows_at_once(64, 132 * 32 + 8))


@pytest.mark.parametrize("sizes", CONVOLVED.values(), ids=CONVOLVED)
def test_linear_rows_and_a_convolution(sizes, device, nan_filled):
    check_convolved(linear_rows, *sizes, device=device)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(conv_weight=None), "conv_weight must be given with conv_state, got nothing"),
        (
            dict(conv_weight=torch.ones(6, 5, dtype=BF16)),
            r"conv_weight's w must be in 2\.\.4, got 5",
        ),
        (dict(conv_first=3), r"conv_first and channels must be even, and within o=16, got 3 and 6"),
        (dict(conv_first=12), r".*and within o=16, got 12 and 6"),
        (dict(conv_first=-2), r".*and within o=16, got -2 and 6"),
        (dict(conv_weight=torch.ones(6, 4)), "conv_weight must be torch.bfloat16"),
        (dict(conv_bias=torch.ones(5)), r"conv_bias must be \(channels=6,\)"),
        (dict(conv_state=torch.ones(3, 2, 6, dtype=BF16)), r"conv_state must be \(b=3, w - 1=3"),
        (dict(conv_state=torch.ones(3, 3, 6)), "conv_state must be torch.bfloat16"),
        (
            dict(conv_state=torch.ones(3, 6, 3, dtype=BF16).mT),
            "conv_state must be contiguous within a row",
        ),
    ],
)
def test_linear_rows_refuses_convolutions(change, message):
    x, weight = torch.ones(3, 8, dtype=BF16), torch.ones(16, 8, dtype=BF16)
    conv = convolution(3, 16, 4, 6, 2, True, True) | change
    with pytest.raises(RuntimeError, match=f"linear_rows: {message}"):
        linear_rows(x, weight, **conv)


@pytest.mark.parametrize(
    "x, weight, message",
    [
        (torch.ones(3, 8), torch.ones(8, 8), "x must be torch.bfloat16, got torch.float32"),
        (torch.ones(3, 12, dtype=BF16), torch.ones(8, 12), r"x must be \(b, d a multiple of 8\)"),
        (torch.ones(3, 8, dtype=BF16), torch.ones(8, 16), r"weight must be \(o, d=8\)"),
        (torch.ones(3, 8, dtype=BF16), torch.ones(12, 8, dtype=BF16), r"weight must be \(o a mult"),
    ],
)
def test_linear_rows_refusals(x, weight, message):
    with pytest.raises(RuntimeError, match=f"linear_rows: {message}"):
        linear_rows(x, weight)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(z=torch.ones(2, 8)), r"z must be \(b=3, d=8\), got \(2, 8\)"),
        (dict(weight=torch.ones(5, 7)), r"weight must be \(o, d=8\), got \(5, 7\)"),
        (dict(residual=torch.ones(3, 4)), r"residual must be \(b=3, o=5\), got \(3, 4\)"),
        (dict(group_size=3), r"group_size must be a divisor of d=8, got 3"),
        (dict(residual=torch.ones(5, 3).T), r"residual's last stride must be 1, got 3"),
        (dict(z=torch.ones(3, 8, dtype=F64)), r"z must be torch.float32, got torch.float64"),
    ],
)
def test_refusals(change, message):
    inputs = dict(x=torch.ones(3, 8), norm_weight=torch.ones(8), weight=torch.ones(5, 8))
    with pytest.raises(RuntimeError, match=f"norm_linear: {message}"):
        norm_linear(**{**inputs, **change})
