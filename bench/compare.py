"""Times builds of the operators beside each other, in one process on one GPU.

    python -m bench.compare BEFORE/mamba2_cuda/_ops.abi3.so AFTER/mamba2_cuda/_ops.abi3.so
    python -m bench.compare A.so B.so C.so --ops fwd --shapes 2.7b_b1_l2k 2.7b_b8_l4k

Cards differ by several percent, and one card from minute to minute, so that two runs do not tell
builds apart that calls in turn do. Where launches dominate, blocks of replays of one build's CUDA
graph take turns: behind another build's kernel the instruction cache is cold. Says how each
differs from the first, and whether its results are the same to the bit. Saves nothing.
"""

import argparse
import math
import statistics
import tempfile
from pathlib import Path

import torch

from bench import timing
from bench.shapes import LAUNCH_BOUND, SHAPES, inputs

NAMESPACE = b"mamba2_cuda"
OPS = ("fwd", "bwd")
ROUNDS, REPLAYS, WARM = 16, 20, 3  # of a build's graph; the first replays of a block do not count


def main():
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        builds = [operators(path, i, folder) for i, path in enumerate(options.builds)]
    torch.cuda.set_stream(torch.cuda.Stream())  # CUDA graphs cannot capture the default stream
    for name in options.shapes:
        for op in options.ops:
            calls = [call_of(build, SHAPES[name], op, "cuda") for build in builds]
            first = calls[0]()
            same = [all(map(torch.equal, first, call())) for call in calls]
            del first
            ms = replayed(calls) if name in LAUNCH_BOUND else in_turn(calls, options.seconds)
            print(f"{name:16} {op}  {line(ms, same)}", flush=True)


def parse_options():
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("builds", nargs="+", type=Path, help="the operators' libraries; the first is the measure")
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--ops", nargs="+", choices=OPS, default=list(OPS))
    add("--seconds", type=float, default=0.5, help="of GPU time, all builds of a shape together")
    return parser.parse_args()


def operators(path, i, folder):
    """torch.ops' namespace of a build, of which several can be loaded: a copy of the library has
    another one of as many letters."""
    name = f"mamba2_{i:04}"
    assert len(name) == len(NAMESPACE)
    copy = Path(folder) / f"{name}.so"
    copy.write_bytes(Path(path).read_bytes().replace(NAMESPACE, name.encode()))
    torch.ops.load_library(str(copy))
    return getattr(torch.ops, name)


def call_of(ops, shape, op, device):
    """A function that runs the forward or the backward of a shape and returns its results."""
    arguments, options = inputs(shape, torch.bfloat16, device, False)
    tensors = (*arguments, options["D"], None, options["dt_bias"], None, None, None)
    delta = (True, 0.0, math.inf)
    if op == "fwd":
        return lambda: ops.ssd_scan_forward(*tensors, *delta, True, False, 0)
    random = torch.Generator(device).manual_seed(1)
    dy = torch.randn(arguments[0].shape, generator=random, device=device).to(torch.bfloat16)
    return lambda: ops.ssd_scan_backward(dy, None, *tensors, None, *delta, 0)


def in_turn(calls, seconds):
    """Median ms of each, one call of each after another."""
    flush = torch.empty(timing.L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    once = timing.elapsed([timing.timed(call, flush) for _ in range(3) for call in calls])
    turns = max(10, int(seconds * 1e3 / sum(once[-len(calls) :])))
    pairs = [[timing.timed(call, flush) for call in calls] for _ in range(turns)]
    times = [timing.elapsed(turn) for turn in pairs]
    return [statistics.median(of_build) for of_build in zip(*times)]


def replayed(calls):
    """Median ms of a CUDA graph of each, in blocks of replays."""
    flush = torch.empty(timing.L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    graphs = [timing.graphed(call) for call in calls]
    times = [[] for _ in calls]
    for _ in range(ROUNDS):
        for of_build, replay in zip(times, graphs):
            block = timing.elapsed([timing.timed(replay, flush) for _ in range(REPLAYS)])
            of_build += block[WARM:]
    return [statistics.median(of_build) for of_build in times]


def line(ms, same):
    """What is printed of one shape: ms, percent beside the first, `bits` where results differ."""
    shown = [
        f"{t:.4f} ({(t / ms[0] - 1) * 100:+.1f}%{'' if equal else ', other bits'})"
        for t, equal in zip(ms, same)
    ]
    return "  ".join(shown)


if __name__ == "__main__":
    main()
