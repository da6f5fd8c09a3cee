"""add_norm's CUDA kernels on the emulated card."""

import pytest
from test_add_norm import CASES, check, make_inputs


@pytest.mark.parametrize("name", CASES)
def test_values(emulated, name, nan_filled):
    def add_norm(residual, x, weight, *, eps):
        return emulated.ops.add_norm(residual, x, weight, eps)

    check(CASES[name], add_norm, *make_inputs(CASES[name]))
