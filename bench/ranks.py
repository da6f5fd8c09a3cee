"""Times the scan of one sequence shared by the GPUs of a machine against one GPU's.

    python -m bench.ranks                 2.7b_b1_l64k on one GPU, then on two

Rows as bench.run writes them, with "ranks": how many GPUs. A time is that of the slowest rank.
"""

import os
import tempfile
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import mamba2_cuda
from bench import command, rows, timing
from bench.shapes import SHAPES, inputs
from mamba2_cuda.nn.ranks import scan_shared_sequence


def main():
    options = parse_options()
    common = command.begin("ranks", options)
    alone, shared = (spawned(ranks, options) for ranks in (1, options.ranks))
    measured = [
        {
            "op": f"ssd_{op}",
            "shape": options.shape,
            "dtype": "bf16",
            "impl": "mamba2_cuda",
            "version": mamba2_cuda.__version__,
            "ms": round(ms, 5),
            "graph": False,
            "ranks": ranks,
            "ratio": round(alone[op] / ms, 3),
            **common,
        }
        for ranks, times in ((1, alone), (options.ranks, shared))
        for op, ms in times.items()
    ]
    for row in measured:
        print(f"{row['shape']} {row['op']:10} {row['ranks']} GPUs {row['ms']:8.3f} ms", end="")
        print(f", {row['ratio']:.2f} times one")
    if not options.unchecked:
        rows.add(options.results / "h200_ranks.json", measured)


def parse_options():
    parser = command.parser("ranks", __doc__, "h200_ranks.json")
    parser.add_argument("--shape", choices=SHAPES, default="2.7b_b1_l64k")
    parser.add_argument("--ranks", type=int, default=2)
    return parser.parse_args()


def spawned(ranks, options):
    """Times by op, each of the slowest of so many processes, a GPU each."""
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        times = manager.dict()
        mp.spawn(measure, (ranks, options.shape, folder, times), nprocs=ranks)
        return dict(times)


def measure(rank, ranks, shape, folder, times):
    torch.cuda.set_device(rank)
    method = f"file://{os.path.join(folder, 'meeting')}"
    dist.init_process_group("nccl", init_method=method, rank=rank, world_size=ranks)
    shape = SHAPES[shape]
    arguments, options = inputs(replace(shape, l=shape.l // ranks), torch.bfloat16, "cuda", True)
    leaves = (*arguments, *options.values())

    def forward():
        if ranks == 1:
            return mamba2_cuda.ssd_scan(*arguments, **options, dt_softplus=True)
        return scan_shared_sequence(*arguments, group=dist.group.WORLD, **options, dt_softplus=True)

    dy = torch.randn_like(arguments[0])
    calls = {
        "fwd": torch.no_grad()(forward),
        "train": lambda: torch.autograd.grad(forward(), leaves, dy),
    }
    for op, call in calls.items():
        for _ in range(3):
            call()
        ms = torch.tensor([timing.median_ms(call, count=20)], device="cuda")
        dist.all_reduce(ms, op=dist.ReduceOp.MAX)
        if rank == 0:
            times[op] = ms.item()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
