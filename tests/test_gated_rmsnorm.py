"""gated_rmsnorm: values and every gradient, groups, gates, strides."""

from dataclasses import dataclass

import layers
import pytest
import torch

import mamba2_cuda
from mamba2_cuda import reference


@dataclass(frozen=True)
class Norm:
    shape: tuple = (2, 5, 48)
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None
    z: bool = True
    group_size: int | None = None
    norm_before_gate: bool = False
    sliced: bool = False


BF16, F16 = torch.bfloat16, torch.float16
CASES = {
    "plain": Norm(),
    "gate outside": Norm(norm_before_gate=True, group_size=16),
    "no gate": Norm(z=False),
    "bf16, sliced": Norm((2, 33, 1536), BF16, torch.float32, sliced=True),
    "bf16, gate outside": Norm((1, 40, 2304), BF16, norm_before_gate=True, sliced=True),
    "bf16, 3 vectors": Norm((1, 3, 5376), BF16, torch.float32),
    "fp16, 4 vectors": Norm((1, 3, 8192), F16, torch.float32),
    "fp16, groups": Norm((1, 70, 256), F16, group_size=32),
    "fp32, large": Norm((1, 2, 8192)),
    "larger than a block": Norm((1, 2, 8200), norm_before_gate=True),
    "odd": Norm((1, 7, 45), BF16, group_size=15),
    "fp64": Norm((2, 9, 40), torch.float64, group_size=10),
    "fp64, gate outside": Norm((2, 9, 40), torch.float64, norm_before_gate=True),
    "one dimension": Norm((24,)),
    "two dimensions": Norm((3, 24), BF16),
    "four dimensions": Norm((2, 3, 2, 24), BF16),
    "no token": Norm((2, 0, 24)),
}


def make_inputs(c, device="cpu"):
    random_ = torch.Generator().manual_seed(4)

    def normal(*shape, dtype=None):
        v = torch.randn(shape, dtype=torch.float64, generator=random_).to(dtype or c.dtype)
        return layers.sliced(v, 16 // v.element_size()) if c.sliced and len(shape) > 1 else v

    inputs = {"x": normal(*c.shape), "weight": normal(c.shape[-1], dtype=c.weight_dtype)}
    if c.z:
        inputs["z"] = normal(*c.shape)
    inputs = {k: v.to(device) for k, v in inputs.items()}
    options = {"group_size": c.group_size, "norm_before_gate": c.norm_before_gate, "eps": 1e-4}
    return inputs, options


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, device, nan_filled):
    run = layers.run_public(mamba2_cuda.gated_rmsnorm)
    layers.check(run, reference.gated_rmsnorm, *make_inputs(CASES[name], device))


def test_gradient_of_a_sum(device):
    """Its stride is 0."""
    inputs, options = make_inputs(Norm(), device)
    leaves = [v.requires_grad_() for v in inputs.values()]
    got = torch.autograd.grad(mamba2_cuda.gated_rmsnorm(**inputs, **options).sum(), leaves)
    expected = torch.autograd.grad(reference.gated_rmsnorm(**inputs, **options).sum(), leaves)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("first", [3, 8])
def test_destinations(ops, device, first):
    """dx and dz land in slices of one wider gradient, and nothing else of it is touched."""
    inputs, _ = make_inputs(Norm(dtype=BF16), device)
    x, weight, z = inputs["x"], inputs["weight"], inputs["z"]
    arguments = (torch.ones_like(x), x, weight, z, 1e-5, 48, False)
    expected = ops.gated_rmsnorm_backward(*arguments, None, None)
    wide = torch.full((*x.shape[:2], 128), 7.0, dtype=BF16, device=device)
    dx, dz = (wide[:, :, begin : begin + 48] for begin in (first, 64 + first))
    got = ops.gated_rmsnorm_backward(*arguments, dx, dz)
    assert torch.equal(dx, expected[0]) and torch.equal(dz, expected[2])
    assert torch.equal(got[1], expected[1]) and got[0].numel() == got[2].numel() == 0
    for untouched in (slice(0, first), slice(first + 48, 64 + first), slice(112 + first, 128)):
        assert (wide[:, :, untouched] == 7).all()


@pytest.mark.parametrize("name", ["bf16, sliced", "no gate", "fp64"])
def test_opcheck(name, device, ops):
    c = CASES[name]
    inputs, _ = make_inputs(c, device)
    tensors = (inputs["x"], inputs["weight"], inputs.get("z"))
    options = (1e-5, c.group_size or c.shape[-1], c.norm_before_gate)
    torch.library.opcheck(ops.gated_rmsnorm_forward.default, (*tensors, *options))
    arguments = (torch.ones_like(inputs["x"]), *tensors, *options, None, None)
    torch.library.opcheck(ops.gated_rmsnorm_backward.default, arguments)


def test_second_differentiation_is_refused(device):
    x = torch.randn(3, 8, device=device, requires_grad=True)
    y = mamba2_cuda.gated_rmsnorm(x, torch.randn(8, device=device))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="a second differentiation is not implemented"):
        dx.sum().backward()


WRONG = {
    "weight": ({"weight": torch.zeros(47)}, r"weight must be \(d=48,\), got \(47,\)"),
    "z": ({"z": torch.zeros(2, 4, 48)}, r"z must be \(b=2, l=5, d=48\), got \(2, 4, 48\)"),
    "z's dtype": ({"z": torch.zeros(2, 5, 48).half()}, "z must be torch.float32, got torch.f"),
    "group size": ({"group_size": 36}, "group_size must be a divisor of d=48, got 36"),
}


@pytest.mark.parametrize("name", WRONG)
def test_message(name, device):
    wrong, message = WRONG[name]
    inputs, options = make_inputs(Norm())
    arguments = {**inputs, **options, **wrong}
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=f"gated_rmsnorm: {message}"):
        mamba2_cuda.gated_rmsnorm(**arguments)
