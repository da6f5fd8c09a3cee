"""Random problems on the emulated card, forward and backward, against the reference: all options,
packings, decays and tiers (tests/random_problems.py), under random schedules of the card.

    python -m pytest tests/emulation/test_random_problems.py --random-problems 500     a longer hunt
    ... --first-problem 17 --random-problems 1                                 problem 17 once more

A wait that never ends shows as the emulation's report of who waits for what or, where a loop polls,
as no answer in time. What it caught: a deadlock of fused_scan with a ring of two stages, where the
decays asked for their next ticket before they handed over a chunk, and the loader, from whom the
ticket comes, waited for that chunk. With this mistake put back 3 of the first 64 problems end in
the report, and 9 of the first 200.
"""

import json
import sys

import pytest
import torch
from common import run_ops
from emulated_card import Emulated
from random_problems import judge, problem
from worker import Worker

SECONDS = 300  # which a problem with all its draws may take on a busy machine


@pytest.fixture(scope="module")
def worker(emulation_build):
    made = Worker(__file__, emulation_build.build_operators(), seconds=SECONDS)
    yield made
    made.end()


def test_random_problem(number, worker):
    try:
        report = json.loads(worker.ask(number))
    except AssertionError as failure:
        report = str(failure)
    again = f"--first-problem {number} --random-problems 1"
    assert not report, f"problem {number} ({again}): {problem(number)}\n{report}"


def main(library):
    """Answers a number with what is wrong with that problem's results, as one line of JSON."""
    torch.set_num_threads(1)
    card = Emulated(library)
    for line in sys.stdin:
        p, report = problem(int(line)), ""
        card.schedule(**p.schedule)
        try:
            judge(run_ops(card.ops, p.plan), p.case, p.plan)
        except (AssertionError, RuntimeError) as failure:
            report = str(failure) or repr(failure)
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
