"""A test's other process: it answers, or is ended, and what it said last is passed on."""

import pytest
from worker import Worker

CODE = """
import sys, time
for line in sys.stdin:
    if line == "wait\\n":
        time.sleep(600)
    if line == "fail\\n":
        sys.exit("it went wrong")
    print("heard", line.strip(), flush=True)
"""


@pytest.fixture
def worker():
    made = Worker("-c", CODE, seconds=20)
    yield made
    made.end()


def test_one_process_answers_all_questions(worker):
    assert worker.ask("one") == "heard one"
    process = worker.process
    assert worker.ask(2) == "heard 2"
    assert worker.process is process


def test_a_process_that_fails_is_replaced(worker):
    with pytest.raises(AssertionError, match="ended\nit went wrong"):
        worker.ask("fail")
    assert worker.ask("again") == "heard again"


def test_a_process_that_waits_for_ever_is_ended(worker):
    assert worker.ask("one") == "heard one"
    process, worker.seconds = worker.process, 0.1
    with pytest.raises(AssertionError, match="no answer in 0.1 s"):
        worker.ask("wait")
    assert process.poll() is not None
