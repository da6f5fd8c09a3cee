"""cross_entropy's CUDA kernels on the emulated card."""

import math

import pytest
import torch
from test_cross_entropy import CASES, TOLERANCE, Case, check, make_inputs


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_operators(emulated, name, dtype, nan_filled):
    case = CASES[name]
    case = Case(case.rows, case.vocab, case.wide, dtype)
    ops = emulated.ops
    check(case, *make_inputs(case), ops.cross_entropy_forward, ops.cross_entropy_backward)


def test_targets_out_of_range(emulated):
    logits, targets = make_inputs(Case(3, 8, 0, torch.float32))
    targets[:] = torch.tensor([1, 8, -1])
    losses = emulated.ops.cross_entropy_forward(logits, targets, torch.tensor(1.0))
    assert [math.isnan(loss) for loss in losses] == [False, True, True]
    assert logits[1:].isnan().all() and logits[0].isfinite().all()
