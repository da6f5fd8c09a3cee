"""Says whether the tests of exactly these sources were green: a pytest plugin writes it down.

python -m pytest -p bench.stamp        writes out/tests.json
require_green(gpu)                     raises RedTests unless it is green, current and whole
"""

import hashlib
import json
import os
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = Path(os.environ.get("OUT", ROOT / "out")) / "tests.json"
COMMITTED = ROOT / "bench/results/tests.json"
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


class RedTests(RuntimeError):
    """The tests of these sources failed, or were not run."""


def digest():
    """A hash of every source that the operators are made of."""
    seen = hashlib.sha256()
    for folder in ("csrc", "mamba2_cuda"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp", ".py"):
                seen.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()


def require_green(gpu):
    """Returns the stamp, or raises RedTests; `gpu` asks for tests that ran with a GPU."""
    how = "run `python -m pytest -p bench.stamp` first"
    stamps = [json.loads(path.read_text()) for path in (STAMP, COMMITTED) if path.exists()]
    if not stamps:
        raise RedTests(f"no test run is on record ({STAMP}): {how}")
    current = [stamp for stamp in stamps if stamp["digest"] == digest()]
    if not current:
        raise RedTests(f"the sources changed since the tests ran: {how}")
    stamp = current[0]
    if stamp["failed"] or stamp["error"] or stamp["exit_status"] or not stamp["passed"]:
        raise RedTests(f"the tests are red ({STAMP}): {stamp['summary']}")
    if gpu and not stamp["gpu"]:
        raise RedTests(f"the tests ran with no GPU: {how} on this machine")
    return stamp


def refuse_if_red(unchecked, gpu=True):
    """Ends a bench whose tests are not green; `unchecked`: says so and goes on."""
    try:
        print("tests:", require_green(gpu)["summary"])
    except RedTests as red:
        if not unchecked:
            raise SystemExit(f"no figures: {red}") from None
        print(f"UNCHECKED, nothing is saved: {red}")


def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workerinput"):
        return  # a worker of pytest-xdist saw a part only; the controller knows the whole
    import torch

    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    counts = {outcome: len(reporter.stats.get(outcome, [])) for outcome in OUTCOMES}
    stamp = {
        **counts,
        "exit_status": int(exitstatus),
        "summary": ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "torch": torch.__version__,
        "arguments": list(session.config.invocation_params.args),
        "digest": digest(),
        "date": time.strftime("%Y-%m-%d"),
    }
    STAMP.parent.mkdir(parents=True, exist_ok=True)
    STAMP.write_text(json.dumps(stamp, indent=1) + "\n")
