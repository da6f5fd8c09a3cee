"""The operators' own CUDA path on the emulated card: host side, plan, launches and kernels, against
the reference at small shapes. Tests of one tier's kernels stand beside this file."""

import pytest
import torch
from cases import Case
from common import check, run_ops

ANY = 1  # a plan that forces tier any (csrc/ssd/plan.h)


@pytest.mark.parametrize("timing", ["random", "late"])
def test_tier_any(emulated, timing):
    emulated.schedule(seed=3, timing=timing, blocks=3)
    case = Case(b=1, l=70, h=2, p=8, g=1, n=8, D="h", z=True, initial_states="working")
    check(run_ops(emulated.ops, plan=ANY), case)


def test_an_argument_check_reaches_the_caller(emulated):
    x = torch.zeros(1, 4, 2, 8)
    B = torch.zeros(1, 4, 1, 8)
    arguments = [x, torch.zeros(1, 4, 3), torch.zeros(2), B, B, *[None] * 6]
    with pytest.raises(RuntimeError, match="dt must be"):
        emulated.ops.ssd_scan_forward(*arguments, False, 0.0, 1.0, True, False, ANY)
