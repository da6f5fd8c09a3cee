"""Times the memory-bound operators around the scan against a copy of the same bytes on one GPU.

    python -m bench.around                               every operator at the shapes of the models
    python -m bench.around --ops ssd_step --unchecked    some, before the tests; saves nothing

What counts is the share: the time that a device-to-device copy takes for as many bytes as the
operator must at least move, over the operator's own. floor_share of a row is by the rate of a large
copy; copy_share, printed last, by copies as many and as large as the operator's calls (copy_ms),
called in the same way or plainly, whichever is faster: little data is slow to copy, too.
"""

from dataclasses import dataclass

import torch

from bench import command, rows, timing
from mamba2_cuda import __version__
from mamba2_cuda._dtypes import DTYPE_CODE
from mamba2_cuda.ops import ssd_step  # registers the operators

OPS = (
    "causal_conv1d_fwd",
    "causal_conv1d_bwd",
    "gated_rmsnorm_fwd",
    "gated_rmsnorm_bwd",
    "add_norm_fwd",
    "add_norm_bwd",
    "ssd_step",
)
SHAPES = ((8, 4096, 5376), (2, 16384, 5376), (8, 2048, 1792))  # b, l, d
RESIDUALS = ((8, 4096, 2560), (8, 2048, 768))  # b, l, d of add_norm
WIDTH = 4
BATCHES = (1, 16, 64, 256)  # of ssd_step, at h 80, p 64, g 1, n 128
STATE_DTYPES = (torch.float32, torch.bfloat16)
STEPS = 24  # of small batches, each with a state of its own, in one CUDA graph, as in a model
STEPS_BYTES = 128 << 20


@dataclass
class Problem:
    op: str
    shape: str
    dtype: str
    call: object  # a function without arguments
    bytes: int  # that it must at least move, in all of its steps
    steps: int = 1  # in one call: the time of a row is that of one


def main():
    options = parse_options()
    common = command.begin("around", options)
    copy_rate = timing.copy_bytes_per_second()
    print(f"{torch.cuda.get_device_name()}: copy {copy_rate / 1e12:.2f} TB/s")
    torch.cuda.set_stream(torch.cuda.Stream())  # CUDA graphs cannot capture the default stream
    measured = []
    for problem in problems(options.ops):
        measured.append({**measure(problem, copy_rate), **common})
        line = rows.table(measured[-1:]).splitlines()[1]
        print(f"{line.rstrip()} {measured[-1]['copy_share']:6.2f}", flush=True)
    if not options.unchecked:
        rows.add(options.results / "h200_around.json", measured)


def parse_options():
    parser = command.parser("around", __doc__, "h200_around.json")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    return parser.parse_args()


def problems(ops):
    for op in ops:
        if op == "ssd_step":
            for dtype in STATE_DTYPES:
                yield from (step_problem(b, dtype) for b in BATCHES)
        elif op.startswith("add_norm"):
            yield from (residual_problem(op, *shape) for shape in RESIDUALS)
        else:
            yield from (layer_problem(op, *shape) for shape in SHAPES)


def layer_problem(op, b, l, d):
    """The convolution or the norm on slices of a projection 2 d wide, as a mixer has them."""
    layer, direction = op.rsplit("_", 1)
    projection = torch.randn(b, l, 2 * d, device="cuda").bfloat16()
    z, x, dy = projection[..., :d], projection[..., d:], torch.randn_like(projection[..., :d])
    ops, arrays = torch.ops.mamba2_cuda, {"causal_conv1d": (2, 3), "gated_rmsnorm": (3, 5)}[layer]
    if layer == "causal_conv1d":
        weight, bias = torch.randn(d, WIDTH, device="cuda"), torch.randn(d, device="cuda")
        arguments = (x, weight, bias, None, None, True)
        call = {
            "fwd": lambda: ops.causal_conv1d_forward(*arguments, False),
            "bwd": lambda: ops.causal_conv1d_backward(dy, None, *arguments, None),
        }[direction]
    else:
        arguments = (x, torch.ones(d, device="cuda"), z, 1e-5, d, False)
        call = {
            "fwd": lambda: ops.gated_rmsnorm_forward(*arguments),
            "bwd": lambda: ops.gated_rmsnorm_backward(dy, *arguments, None, None),
        }[direction]
    moved = arrays[direction == "bwd"] * b * l * d * 2
    return Problem(op, f"b{b}_l{l}_d{d}", "bf16", call, moved)


def residual_problem(op, b, l, d):
    """A residual in fp32, what is added to it and its norm in bf16: those of a training step."""
    residual, passed = (torch.randn(b, l, d, device="cuda") for _ in range(2))
    x, weight = torch.randn_like(residual).bfloat16(), torch.ones(d, device="cuda")
    ops, code = torch.ops.mamba2_cuda, DTYPE_CODE[torch.bfloat16]
    call, moved = {
        "add_norm_fwd": (lambda: ops.add_norm_forward(residual, x, weight, 1e-5, code), 12),
        "add_norm_bwd": (
            lambda: ops.add_norm_backward(x, passed, residual, weight, 1e-5, code),
            16,
        ),
    }[op]
    return Problem(op, f"b{b}_l{l}_d{d}", "bf16", call, moved * b * l * d)


def step_problem(b, state_dtype, h=80, p=64, n=128):
    """Steps as the layers of a model take them: in one CUDA graph, each with its own state."""

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device="cuda").to(dtype)

    size = torch.finfo(state_dtype).bits // 8
    steps = max(1, min(STEPS, STEPS_BYTES // (b * h * p * n * size)))
    states = [normal(b, h, p, n, dtype=state_dtype) for _ in range(steps)]
    x, z, B, C = normal(b, h, p), normal(b, h, p), normal(b, 1, n), normal(b, 1, n)
    dt, A, D, bias = normal(b, h), -torch.rand(h, device="cuda"), normal(h), normal(h)
    options = {"D": D, "z": z, "dt_bias": bias, "dt_softplus": True, "early_state": steps > 1}

    def call():
        for state in states:
            ssd_step(state, x, dt, A, B, C, **options)

    moved = steps * (2 * b * h * p * n * size + 3 * x.numel() * 2)
    name = "fp32" if size == 4 else "bf16"
    return Problem("ssd_step", f"2.7b_b{b}", f"{name} state", call, moved, steps)


def copies(problem):
    """As many bytes read and written as the problem's, in as many calls."""
    size = problem.bytes // problem.steps // 2
    buffers = torch.zeros(problem.steps, 2, size, dtype=torch.int8, device="cuda")

    def call():
        for target, source in buffers:
            target.copy_(source)

    return call


def measure(problem, copy_rate):
    graph = problem.op == "ssd_step"

    def time_of(call, graph):
        for _ in range(3):
            call()
        return timing.median_ms(timing.graphed(call) if graph else call)

    with torch.no_grad():
        ms, copy = time_of(problem.call, graph), copies(problem)
        # A graph's copy of a gigabyte is slower than one called plainly.
        copy_ms = min(time_of(copy, way) for way in {graph, False})
    return {
        "op": problem.op,
        "shape": problem.shape,
        "dtype": problem.dtype,
        "impl": "mamba2_cuda",
        "version": __version__,
        "ms": round(ms / problem.steps, 6),
        "graph": graph,
        "tb_per_s": round(problem.bytes / ms * 1e-9, 3),
        "copy_ms": round(copy_ms / problem.steps, 6),
        "floor_share": round(problem.bytes / copy_rate * 1e3 / ms, 4),
        "copy_share": round(copy_ms / ms, 4),
    }


if __name__ == "__main__":
    main()
