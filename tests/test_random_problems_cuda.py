"""Random problems on a GPU, forward and backward, against the reference: those of
tests/random_problems.py, of a card's sizes. Each is run twice, for the same bits.

    python -m pytest tests/test_random_problems_cuda.py --random-problems 2000         a longer hunt
    ... --first-problem 17 --random-problems 1                                 problem 17 once more
"""

import pytest
from common import plans, run_ops
from random_problems import judge, problem

pytestmark = pytest.mark.gpu
TIER = 0xF  # the bits of a plan that force one


def test_random_problem(number, cuda, ops):
    p = problem(number, cuda)
    if p.plan & TIER not in plans(cuda, p.case.dtype):
        pytest.skip(f"plan {p.plan:#x} is not this card's")
    try:
        judge(run_ops(ops, p.plan), p.case, p.plan, cuda)
    except AssertionError as failure:
        again = f"--first-problem {number} --random-problems 1"
        raise AssertionError(f"problem {number} ({again}): {p}\n{failure}") from None
