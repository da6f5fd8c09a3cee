"""ssd_scan on the CPU beside the PyTorch reference, forward and backward together.

    python -m bench.cpu [--threads 2] [--results bench/results]

Times ssd_scan at l 2048, h 8, p 64, n 64, fp32 beside the reference's block form (the one to be at
least as fast as) and its recurrent form (the one to be ten times as fast as). Medians, each side
run in turn. Refuses when the tests of these sources were not green.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import torch

import mamba2_cuda
from bench import rows, stamp
from bench.shapes import Shape, inputs
from mamba2_cuda import reference

SHAPE = Shape("cpu_l2k_h8", 1, 2048, 8, 64, 1, 64)
GOALS = {"block": 1.0, "recurrent": 10.0}  # the reference's time over ours, at least
REPEATS = {"mamba2_cuda": 20, "block": 20, "recurrent": 3}


def main():
    options = parse_options()
    torch.set_num_threads(options.threads)
    stamp.refuse_if_red(options.unchecked, gpu=False)
    ms = {name: statistics.median(times) for name, times in measure(calls()).items()}
    ratios = {name: ms[name] / ms["mamba2_cuda"] for name in GOALS}
    print(f"{processor()}, {options.threads} threads, torch {torch.__version__}, {SHAPE}, fp32")
    for name, time_ms in ms.items():
        goal = f"{ratios[name]:.2f} x ours (goal {GOALS[name]:g})" if name in GOALS else ""
        print(f"  {name:12} {time_ms:9.1f} ms  {goal}")
    if not options.unchecked:
        rows.add(options.results / "cpu.json", [row(ms, ratios, options.threads)])
    return 0 if all(ratios[name] >= goal for name, goal in GOALS.items()) else 1


def parse_options():
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    out = Path(os.environ.get("OUT", stamp.ROOT / "bench/results"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=out)
    parser.add_argument("--unchecked", action="store_true", help="without green tests; not saved")
    return parser.parse_args()


def calls():
    """Forward and backward, each as a function of no argument, by name."""

    def step(scan, **options):
        arguments, more = inputs(SHAPE, torch.float32, "cpu", requires_grad=True)
        leaves, dy = (*arguments, *more.values()), torch.randn_like(arguments[0])

        def run():
            y = scan(*arguments, **more, dt_softplus=True, **options)
            torch.autograd.grad(y, leaves, dy)

        return run

    return {
        "mamba2_cuda": step(mamba2_cuda.ssd_scan),
        "block": step(reference.ssd_scan, form="block"),
        "recurrent": step(reference.ssd_scan, form="recurrent"),
    }


def measure(functions):
    """Times in ms by name: rounds in which each has its turn, after one call to warm up."""
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for turn in range(max(REPEATS.values())):
        for name, function in functions.items():
            if turn < REPEATS[name]:
                begin = time.perf_counter()
                function()
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def processor():
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line]
    return names[0].split(":")[1].strip() if names else platform.processor()


def row(ms, ratios, threads):
    return {
        "op": "ssd_train",
        "shape": SHAPE.name,
        "dtype": "fp32",
        "impl": "mamba2_cuda",
        "version": mamba2_cuda.__version__,
        "ms": round(ms["mamba2_cuda"], 3),
        "graph": False,
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "cpu": f"{processor()}, {threads} threads",
        **rows.provenance("python -m bench.cpu"),
    }


if __name__ == "__main__":
    raise SystemExit(main())
