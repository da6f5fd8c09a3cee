"""Runs one shape's forward and backward once, for a profiler that starts and stops with it.

ncu --profile-from-start off ... python -m bench.once --shape 2.7b_b8_l4k
nsys profile --capture-range cudaProfilerApi ... python -m bench.once
"""

import argparse

import torch

from bench.rivals import ours
from bench.shapes import SHAPES


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.once", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="2.7b_b8_l4k")
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    forward, leaves = ours().prepare(SHAPES[options.shape], requires_grad=True)
    dy = torch.randn_like(forward())
    torch.autograd.grad(forward(), leaves, dy)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for _ in range(options.repeat):
        with torch.no_grad():
            forward()
        torch.autograd.grad(forward(), leaves, dy)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
