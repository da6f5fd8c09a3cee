"""causal_conv1d: values and every gradient, states, packing, strides, steps."""

import math
from dataclasses import dataclass

import layers
import pytest
import torch

import mamba2_cuda
from mamba2_cuda import reference


@dataclass(frozen=True)
class Conv:
    b: int = 2
    l: int = 37
    d: int = 24
    w: int = 4
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None
    bias: bool = True
    silu: bool = True
    initial: bool = False
    final: bool = False
    cu: tuple | None = None
    sliced: bool = False


CASES = {
    "plain": Conv(),
    "bf16": Conv(dtype=torch.bfloat16, weight_dtype=torch.float32, sliced=True, d=264),
    "fp16, states": Conv(dtype=torch.float16, initial=True, final=True, l=70),
    "bf16, width 3": Conv(dtype=torch.bfloat16, w=3, silu=False, initial=True, final=True, l=250),
    "bf16, width 2": Conv(dtype=torch.bfloat16, w=2, bias=False, l=65, b=1),
    "fp64": Conv(dtype=torch.float64, initial=True, final=True, d=5),
    "odd": Conv(d=7, l=61, dtype=torch.bfloat16, initial=True, final=True),
    "shorter than a window": Conv(l=2, initial=True, final=True),
    "one token": Conv(l=1, final=True),
    "no token": Conv(l=0, initial=True, final=True),
    "packed": Conv(b=1, l=130, cu=(3, 3, 40, 42, 43, 110, 110), initial=True, final=True, d=8),
    "packed bf16": Conv(b=1, l=300, cu=(0, 61, 64, 250, 300), dtype=torch.bfloat16, final=True),
    "packed, clamped": Conv(b=1, l=50, cu=(-4, 20, 10, 400), initial=True, final=True),
    "packed, width 2": Conv(b=1, l=50, cu=(1, 20, 21, 49), w=2, silu=False, final=True),
    "no sequence": Conv(b=1, l=9, cu=(4,), final=True),
}


def make_inputs(c, device="cpu"):
    random_ = torch.Generator().manual_seed(3)

    def normal(*shape, dtype=None):
        return torch.randn(shape, dtype=torch.float64, generator=random_).to(dtype or c.dtype)

    x = normal(c.b, c.l, c.d)
    inputs = {
        "x": layers.sliced(x, 16 // x.element_size()) if c.sliced else x,
        "weight": normal(c.d, c.w, dtype=c.weight_dtype),
    }
    if c.bias:
        inputs["bias"] = normal(c.d, dtype=c.weight_dtype)
    if c.initial:
        inputs["initial_states"] = normal(c.b if c.cu is None else len(c.cu) - 1, c.w - 1, c.d)
    if c.cu is not None:
        inputs["cu_seqlens"] = torch.tensor(c.cu)
    inputs = {k: v.to(device) for k, v in inputs.items()}
    return inputs, {"silu": c.silu, "return_final_states": c.final}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, device, nan_filled):
    run = layers.run_public(mamba2_cuda.causal_conv1d)
    layers.check(run, reference.causal_conv1d, *make_inputs(CASES[name], device))


def test_other_sequences_are_not_read(device):
    """NaN outside all sequences and in one of them: nobody else sees it."""
    inputs, options = make_inputs(CASES["packed"], device)
    clean, _ = mamba2_cuda.causal_conv1d(**inputs, **options)
    for tokens in (slice(0, 3), slice(43, 110), slice(110, 130)):
        inputs["x"][:, tokens] = math.nan
    y, _ = mamba2_cuda.causal_conv1d(**inputs, **options)
    assert torch.equal(y[:, 3:43], clean[:, 3:43])
    assert not y[:, :3].any() and not y[:, 110:].any()


def test_gradient_of_a_sum(device):
    """Its stride is 0."""
    inputs, _ = make_inputs(Conv(), device)
    leaves = [inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()]
    got = torch.autograd.grad(mamba2_cuda.causal_conv1d(**inputs).sum(), leaves)
    expected = torch.autograd.grad(reference.causal_conv1d(**inputs).sum(), leaves)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("apart", [False, True])
def test_destination(ops, device, apart):
    """dx lands in a slice of a wider gradient, aligned or not, and nothing else is touched."""
    inputs, _ = make_inputs(Conv(dtype=torch.bfloat16), device)
    x, weight = inputs["x"], inputs["weight"]
    dy, first = torch.ones_like(x), 3 if apart else 8
    expected = ops.causal_conv1d_backward(dy, None, x, weight, None, None, None, True, None)
    wide = torch.full((*x.shape[:2], 40), 7.0, dtype=x.dtype, device=device)
    into = wide[:, :, first : first + 24]
    got = ops.causal_conv1d_backward(dy, None, x, weight, None, None, None, True, into)
    assert torch.equal(into, expected[0]) and got[0].numel() == 0
    assert torch.equal(got[1], expected[1])
    assert (wide[:, :, :first] == 7).all() and (wide[:, :, first + 24 :] == 7).all()


@pytest.mark.parametrize("w", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_steps_are_the_convolution(dtype, w, device):
    inputs, options = make_inputs(Conv(l=9, w=w, dtype=dtype, initial=True, final=True), device)
    expected, final = mamba2_cuda.causal_conv1d(**inputs, **options)
    state, x = inputs["initial_states"].clone(), inputs["x"]
    parameters = inputs["weight"], inputs["bias"]
    y = [mamba2_cuda.causal_conv1d_step(state, x[:, t], *parameters)[:, None] for t in range(4)]
    y.append(mamba2_cuda.causal_conv1d_step(state, x[:, 4:], *parameters))
    torch.testing.assert_close(torch.cat(y, 1), expected)
    assert torch.equal(state, final)


def test_step_slots(device):
    inputs, _ = make_inputs(Conv(l=2), device)
    x, parameters = inputs["x"], (inputs["weight"], inputs["bias"])
    slots = torch.randn(4, 3, 24, device=device)
    before = slots.clone()
    indices = torch.tensor([2, -1], dtype=torch.int32, device=device)
    y = mamba2_cuda.causal_conv1d_step(slots, x, *parameters, state_indices=indices)
    alone = before[2:3].clone()
    assert torch.equal(mamba2_cuda.causal_conv1d_step(alone, x[:1], *parameters), y[:1])
    assert not y[1].any() and torch.equal(slots[2:3], alone)
    assert torch.equal(slots[[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize("name", ["bf16", "packed", "fp64"])
def test_opcheck(name, device, ops):
    inputs, options = make_inputs(CASES[name], device)
    tensors = [inputs.get(k) for k in ("x", "weight", "bias", "initial_states", "cu_seqlens")]
    torch.library.opcheck(ops.causal_conv1d_forward.default, (*tensors, True, CASES[name].final))
    dy = torch.ones_like(inputs["x"])
    arguments = (dy, None, *tensors, True, None)
    torch.library.opcheck(ops.causal_conv1d_backward.default, arguments)


def test_second_differentiation_is_refused(device):
    x = torch.randn(1, 5, 8, device=device, requires_grad=True)
    y = mamba2_cuda.causal_conv1d(x, torch.randn(8, 4, device=device))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a second differentiation is not implemented"):
        dx.sum().backward()


WRONG = {
    "weight of other channels": ({"weight": torch.zeros(23, 4)}, r"weight must be \(d=24, w\)"),
    "width 5": ({"weight": torch.zeros(24, 5)}, "weight's w must be in 2..4, got 5"),
    "x of two dimensions": ({"x": torch.zeros(3, 24)}, r"x must be \(b, l, d\), got \(3, 24\)"),
    "states of another dtype": (
        {"initial_states": torch.zeros(2, 3, 24, dtype=torch.float64)},
        "initial_states must be torch.float32, got torch.float64",
    ),
    "packed batch": ({"cu_seqlens": torch.tensor([0, 9])}, "x's b must be 1 with cu_seqlens"),
}


@pytest.mark.parametrize("name", WRONG)
def test_message(name, device):
    wrong, message = WRONG[name]
    inputs, options = make_inputs(Conv())
    arguments = {k: v.to(device) for k, v in {**inputs, **wrong}.items()}
    with pytest.raises(RuntimeError, match=f"causal_conv1d: {message}"):
        mamba2_cuda.causal_conv1d(**arguments, **options)
