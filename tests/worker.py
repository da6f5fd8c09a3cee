"""A process that answers a test's questions one by one, and that a test can end: what it runs may
wait for ever, and may take less time than a process takes to start."""

import contextlib
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parent


class Worker:
    """Runs `python *command`, which reads a line from stdin, prints a line to stdout, and so on.

    It starts at the first question, and again at the next one after it failed.
    """

    def __init__(self, *command, seconds):
        self.command, self.seconds = [sys.executable, *map(str, command)], seconds
        self.process = None

    def ask(self, question):
        """Its answer to one line. Raises AssertionError where it gives none."""
        if self.process is None:
            self.start()
        with contextlib.suppress(BrokenPipeError):  # it ended: there is no answer either
            print(question, file=self.process.stdin, flush=True)
        ready, _, _ = select.select([self.process.stdout], [], [], self.seconds)
        answer = self.process.stdout.readline() if ready else ""
        if not answer:
            self.end()
            self.said.seek(0)
            why = "ended" if ready else f"gave no answer in {self.seconds} s, and was ended"
            raise AssertionError(f"the process {why}\n{self.said.read()[-2000:]}")
        return answer.rstrip("\n")

    def start(self):
        self.said = tempfile.TemporaryFile("w+")
        path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said,
            text=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def end(self):
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
