"""Times ssd_scan beside its rivals on one GPU.

    python -m bench.run                                  the eight shapes, forward and backward
    python -m bench.run --shapes 2.7b_b8_l4k --impls mamba2_cuda --ops fwd
    python -m bench.run --sweep                          the paper's benchmark figure, as PNG

Refuses when the tests of these sources were not green on this machine's GPU: run
`python -m pytest -p bench.stamp` first.
"""

import gc

import torch

from bench import command, figure, rows, timing
from bench.rivals import implementations
from bench.shapes import (
    LAUNCH_BOUND,
    LENGTH_SWEEP,
    SHAPES,
    STATE_SWEEP,
    attention_flops,
    over_ops,
)
from mamba2_cuda._explain import floor_bytes, flops

OURS, RIVAL = "mamba2_cuda", "mamba_ssm"
IMPLEMENTATIONS = (OURS, "mamba2_cuda_sm80", RIVAL, "sdpa_flash", "sdpa_cudnn")
SWEEP_IMPLEMENTATIONS = (OURS, RIVAL, "sdpa_flash", "sdpa_cudnn")  # the figure's lines
OPS = ("fwd", "bwd", "train")
BUDGET_MS, SWEEP_BUDGET_MS = 300.0, 80.0  # of GPU time a measurement


def main():
    options = parse_options()
    common = command.begin("run", options)
    names = options.impls or (SWEEP_IMPLEMENTATIONS if options.sweep else IMPLEMENTATIONS)
    found, missing = implementations(names, options.mamba_ssm)
    print("not here:", *(missing or ["none"]), sep="\n  ")
    copy_rate = timing.copy_bytes_per_second()
    print(f"{torch.cuda.get_device_name()}: copy {copy_rate / 1e12:.2f} TB/s")
    torch.cuda.set_stream(torch.cuda.Stream())  # CUDA graphs cannot capture the default stream
    name = "h200_sweep.json" if options.sweep else "h200.json"
    measured = []
    budget_ms = SWEEP_BUDGET_MS if options.sweep else BUDGET_MS
    for shape, ops in problems(options):
        new = measure_shape(shape, ops, found, common, copy_rate, budget_ms)
        measured += new
        if not options.unchecked:  # after every shape: a run may be cut short
            rows.add(options.results / name, new)
    print(rows.table(measured))
    if options.sweep:
        figure.draw(measured, options.results / "ssd_sweep.png")


def problems(options):
    """Shapes and the ops to time of each. The sweep: the paper's figure, and a backward."""
    if not options.sweep:
        return [(SHAPES[name], options.ops) for name in options.shapes]
    lengths = [(shape, ("fwd", "bwd")) for shape in LENGTH_SWEEP]
    return lengths + [(shape, ("fwd",)) for shape in STATE_SWEEP]


def parse_options():
    parser = command.parser("run", __doc__, "h200.json")
    command.add_mamba_ssm(parser)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    add("--impls", nargs="+", choices=IMPLEMENTATIONS, default=None, help="default: all (sweep: 4)")
    add("--ops", nargs="+", choices=OPS, default=list(OPS))
    add("--sweep", action="store_true", help="time against length and state size, and the figure")
    return parser.parse_args()


def measure_shape(shape, ops, found, common, copy_rate, budget_ms=BUDGET_MS):
    """Rows of one shape: every implementation, op, and way of calling."""
    measured = []
    for implementation in found:
        if implementation.op == "attention" and shape in STATE_SWEEP:
            continue  # it has no state
        graphs = implementation.op == "ssd" and shape.name in LAUNCH_BOUND
        for op in ops:
            for graph in (False, True) if graphs else (False,):
                try:
                    row = measure(implementation, shape, op, graph, copy_rate, budget_ms)
                except RuntimeError as failure:  # a rival may run out of memory, we may not
                    if implementation.name == OURS:
                        raise
                    print(f"{shape.name} {op} {implementation.name}: {str(failure)[:200]}")
                    continue
                measured.append({**row, **common})
                print(rows.table(measured[-1:]).splitlines()[1], flush=True)
    return with_ratios(measured)


def measure(implementation, shape, op, graph, copy_rate, budget_ms):
    gc.collect()
    torch.cuda.empty_cache()  # no one's memory is cut to the sizes of the one before
    call = calls(implementation, shape, op)
    for _ in range(3):
        call()  # Triton compiles and tunes here
    replay = timing.graphed(call) if graph else call
    ms = timing.median_ms(replay, budget_ms)
    row = {
        "op": f"{implementation.op}_{op}",
        "shape": shape.name,
        "dtype": "bf16",
        "impl": implementation.name,
        "version": implementation.version,
        "ms": round(ms, 5),
        "graph": graph,
    }
    if implementation.op == "ssd":
        moved, computed = over_ops(floor_bytes, shape, op), over_ops(flops, shape, op)
        row["tb_per_s"] = round(moved / ms * 1e-9, 3)
        row["floor_share"] = round(moved / copy_rate * 1e3 / ms, 4)
    else:
        computed = attention_flops(shape, op)
    row["tflop_per_s"] = round(computed / ms * 1e-9, 1)
    if op == "train" and not graph:
        row["peak_extra_bytes"] = timing.peak_extra_bytes(call)
    return row


def calls(implementation, shape, op):
    """The function to time: a forward, a backward through one kept graph, or both."""
    forward, leaves = implementation.prepare(shape, requires_grad=op != "fwd")
    if op == "fwd":
        return torch.no_grad()(forward)
    if op == "bwd":
        y = forward()
        dy = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
    dy = torch.randn_like(forward())
    return lambda: torch.autograd.grad(forward(), leaves, dy)


def with_ratios(measured):
    """Adds to our rows of one shape how many times as long each other implementation takes."""
    for row in measured:
        if row["impl"] == OURS:
            row["ratios"] = {
                other["impl"]: round(other["ms"] / row["ms"], 3)
                for other in measured
                if other["impl"] != OURS and same_work(row, other)
            }
            if RIVAL in row["ratios"]:
                row["ratio"] = row["ratios"][RIVAL]
    return measured


def same_work(row, other):
    """Whether both are forwards, or backwards, or both, called in the same way."""
    ways = [(r["op"].split("_")[1], r["graph"]) for r in (row, other)]
    return ways[0] == ways[1]


if __name__ == "__main__":
    main()
