"""gated_rmsnorm's CUDA kernels on the emulated card: values and every gradient against fp64."""

import layers
import pytest
import torch
from test_gated_rmsnorm import BF16, CASES, F16, Norm, make_inputs

from mamba2_cuda import reference
from mamba2_cuda.ops.gated_rmsnorm import as_rows

SMALL = {k: v for k, v in CASES.items() if "dimension" not in k} | {
    "many rows": Norm((1, 1100, 16), BF16, group_size=8, sliced=True),
    "no gate, 2 vectors": Norm((1, 3, 2304), F16, z=False),
    "gate outside, 3 vectors": Norm((1, 3, 5376), BF16, norm_before_gate=True),
}


def run_ops(ops):
    """A run of the registered operators."""

    def run(inputs, options, d_outputs):
        shape = inputs["x"].shape
        x, z, dy = (as_rows(v) for v in (inputs["x"], inputs.get("z"), d_outputs[0]))
        size = options["group_size"] or shape[-1]
        arguments = (x, inputs["weight"], z, options["eps"], size, options["norm_before_gate"])
        y = ops.gated_rmsnorm_forward(*arguments)
        dx, dweight, dz = ops.gated_rmsnorm_backward(dy, *arguments, None, None)
        results = {"y": y.view(shape), "d_x": dx.view(shape), "d_weight": dweight}
        if z is None:
            assert dz.numel() == 0
            return results
        return results | {"d_z": dz.view(shape)}

    return run


@pytest.mark.parametrize("name", SMALL)
def test_values_and_gradients(emulated, name, nan_filled):
    layers.check(run_ops(emulated.ops), reference.gated_rmsnorm, *make_inputs(SMALL[name]))


@pytest.mark.parametrize("timing, blocks", [("early", 1), ("late", 6)])
def test_bits_do_not_depend_on_the_schedule(emulated, timing, blocks):
    inputs, options = make_inputs(Norm((1, 30, 320), BF16))
    d_outputs = layers.gradients_of(reference.gated_rmsnorm, inputs, options)
    first = run_ops(emulated.ops)(inputs, options, d_outputs)
    emulated.schedule(seed=11, timing=timing, blocks=blocks)
    second = run_ops(emulated.ops)(inputs, options, d_outputs)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("first", [3, 8])
def test_destinations(emulated, first):
    """dx and dz land in slices of one wider gradient, and nothing else of it is touched."""
    inputs, _ = make_inputs(Norm(dtype=BF16))
    x, weight, z = inputs["x"], inputs["weight"], inputs["z"]
    arguments = (torch.ones_like(x), x, weight, z, 1e-5, 48, False)
    expected = emulated.ops.gated_rmsnorm_backward(*arguments, None, None)
    wide = torch.full((*x.shape[:2], 128), 7.0, dtype=BF16)
    dx, dz = (wide[:, :, begin : begin + 48] for begin in (first, 64 + first))
    got = emulated.ops.gated_rmsnorm_backward(*arguments, dx, dz)
    assert torch.equal(dx, expected[0]) and torch.equal(dz, expected[2])
    assert torch.equal(got[1], expected[1]) and got[0].numel() == got[2].numel() == 0
    for untouched in (slice(0, first), slice(first + 48, 64 + first), slice(112 + first, 128)):
        assert (wide[:, :, untouched] == 7).all()
