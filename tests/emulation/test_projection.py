"""norm_linear's CUDA kernels on the emulated card."""

import pytest
import torch
from test_norm_linear import CASES, check, make_inputs


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
