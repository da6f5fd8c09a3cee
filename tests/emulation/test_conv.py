"""causal_conv1d's CUDA kernels on the emulated card: values and every gradient against fp64."""

import math

import layers
import pytest
import torch
from test_causal_conv1d import CASES, Conv, make_inputs

from mamba2_cuda import reference

SMALL = {k: v for k, v in CASES.items() if k != "bf16"} | {
    "bf16, two tiles of channels": Conv(
        b=1, l=70, d=264, dtype=torch.bfloat16, weight_dtype=torch.float32, sliced=True
    ),
    "two parts": Conv(b=2, l=250, d=8, dtype=torch.bfloat16),
    "runs of several batches": Conv(b=64, l=530, d=8, dtype=torch.bfloat16, silu=False),
    "packed, runs of several batches": Conv(
        b=1, l=700, d=1001, cu=(2, 20, 37, 38, 40, 150, 699), initial=True, final=True
    ),
}
NAMES = ("x", "weight", "bias", "initial_states", "cu_seqlens")


def run_ops(ops):
    """A run of the registered operators."""

    def run(inputs, options, d_outputs):
        tensors, silu = [inputs.get(k) for k in NAMES], options["silu"]
        y, final = ops.causal_conv1d_forward(*tensors, silu, options["return_final_states"])
        results = {"y": y, "final_states": final}
        if not options["return_final_states"]:
            assert results.pop("final_states").numel() == 0
        dy, d_final = (*d_outputs, None)[:2]
        gradients = ops.causal_conv1d_backward(dy, d_final, *tensors, silu, None)
        return results | {f"d_{k}": g for k, g in zip(NAMES, gradients) if k in inputs}

    return run


@pytest.mark.parametrize("name", SMALL)
def test_values_and_gradients(emulated, name, nan_filled):
    layers.check(run_ops(emulated.ops), reference.causal_conv1d, *make_inputs(SMALL[name]))


def test_other_sequences_are_not_read(emulated):
    """NaN outside all sequences and in one of them: nobody else sees it."""
    inputs, options = make_inputs(CASES["packed"])
    run = run_ops(emulated.ops)
    d_outputs = layers.gradients_of(reference.causal_conv1d, inputs, options)
    clean = run(inputs, options, d_outputs)
    for tokens in (slice(0, 3), slice(43, 110), slice(110, 130)):
        inputs["x"][:, tokens] = math.nan
        d_outputs[0][:, tokens] = math.nan
    dirty = run(inputs, options, d_outputs)
    for name in ("y", "d_x"):
        assert torch.equal(dirty[name][:, 3:43], clean[name][:, 3:43])
        assert not dirty[name][:, :3].any() and not dirty[name][:, 110:].any()


@pytest.mark.parametrize("first", [3, 8])
def test_destination(emulated, first):
    inputs, _ = make_inputs(Conv(dtype=torch.bfloat16))
    x, weight = inputs["x"], inputs["weight"]
    arguments = (torch.ones_like(x), None, x, weight, None, None, None, True)
    expected = emulated.ops.causal_conv1d_backward(*arguments, None)
    wide = torch.full((*x.shape[:2], 40), 7.0, dtype=x.dtype)
    into = wide[:, :, first : first + 24]
    got = emulated.ops.causal_conv1d_backward(*arguments, into)
    assert torch.equal(into, expected[0]) and got[0].numel() == 0
    assert (wide[:, :, :first] == 7).all() and (wide[:, :, first + 24 :] == 7).all()


@pytest.mark.parametrize("w", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_steps_are_the_convolution(emulated, dtype, w):
    inputs, _ = make_inputs(Conv(l=9, w=w, dtype=dtype, initial=True))
    tensors = [inputs.get(k) for k in NAMES]
    expected, final = emulated.ops.causal_conv1d_forward(*tensors, True, True)
    slots = torch.full((5, w - 1, 24), math.nan, dtype=dtype)
    slots[[3, 1]] = inputs["initial_states"]
    indices = torch.tensor([3, 1], dtype=torch.int32)
    step, x = emulated.ops.causal_conv1d_step, inputs["x"]
    y = [step(slots, x[:, t], *tensors[1:3], True, indices)[:, None] for t in range(4)]
    y.append(step(slots, x[:, 4:], *tensors[1:3], True, indices))
    torch.testing.assert_close(torch.cat(y, 1), expected)
    assert torch.equal(slots[[3, 1]], final) and slots[[0, 2, 4]].isnan().all()
    padding = torch.tensor([-1, 5], dtype=torch.int32)
    assert not step(slots, x[:, :2], *tensors[1:3], True, padding).any()
