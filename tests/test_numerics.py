"""Errors of 16-bit kernels, pooled over many problems: at most 1.2 times the yardstick's.

Where a result has few elements, as dA has one a head, a single problem says little: here the
squares of the errors are summed over problems until there are hundreds, and nothing is added to
the 1.2 but what fp32 accumulation costs.
"""

import math
from dataclasses import replace

import pytest
import torch
from cases import Case, make_gradients, make_inputs
from common import plans, run_ops, truth_of, yardstick_error

# Heads are independent problems, and seeds: 24 x 16 = 384 values of dA.
POOLED = Case(b=1, l=192, h=24, g=2, p=32, n=32, D="h", z=True, dt_bias=True,
              initial_states="working")  # fmt: skip
SEEDS = 16
# Sums that kernels form in fp32 from exact products, which the yardstick therefore has exactly.
EXACT_IN_YARDSTICK = {"dD"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", ["weak", "usual", "strong"])
def test_errors_pooled(dtype, decay, device, ops):
    squares = {plan: {} for plan in plans(device, dtype)}
    yard, truth = {}, {}

    def add(total, name, v):
        total[name] = total.get(name, 0.0) + v.double().square().sum().item()

    for seed in range(SEEDS):
        case = replace(POOLED, dtype=dtype, decay=decay, seed=seed, z=seed % 2 == 0)
        if device == "cuda":
            case = replace(case, p=64, n=128)
        inputs, (dy, d_final) = make_inputs(case, device), make_gradients(case, device)
        expected = truth_of(inputs, dy, d_final)
        for name, (operands, _) in yardstick_error(inputs, dy, d_final, expected).items():
            add(yard, name, operands)
            add(truth, name, expected[name])
        for plan, total in squares.items():
            for name, result in run_ops(ops, plan)(inputs, dy, d_final).items():
                add(total, name, result.double() - expected[name])

    accumulation = 2.0**-24 * math.sqrt(POOLED.l * 64)
    report, faults = [], 0
    for plan, total in squares.items():
        for name, square in total.items():
            error, allowed = (math.sqrt(v / truth[name]) for v in (square, yard[name]))
            good = error <= 1.2 * allowed + accumulation * (name in EXACT_IN_YARDSTICK)
            faults += not good
            report.append(f"plan {plan} {name:17} {error:.2e} yardstick {allowed:.2e} {good}")
    print("\n".join(report))
    assert not faults, "\n".join(report)
