"""ssd_segment_state on the emulated card: every tier's backward, where decays are 0 in fp32; tier
sm90's forward where another tier runs the backward."""

from dataclasses import replace

import pytest
import torch
from test_ssd_segment_state import BIASED, CASES, check, run_ops


@pytest.mark.parametrize("plan", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steep_decay(emulated, dtype, plan):
    case = replace(BIASED, dtype=dtype, dt_dtype=torch.float32, p=32, n=32)
    check(run_ops(emulated.ops, plan), case, "cpu", f"plan={plan}", A=-1e4)


@pytest.mark.parametrize("name", ["n 256", "fp16, sliced"])
def test_sm90_forward(emulated, name):
    check(run_ops(emulated.ops, 3), CASES[name], "cpu")
