"""Errors of every output and gradient against fp64, ours beside mamba_ssm's, on one GPU.

    python -m bench.accuracy                           rows, and the tables of docs/numerics.md
    python -m bench.accuracy --impls mamba2_cuda --unchecked

error = ||result - truth|| / ||truth||, Frobenius norms; truth is the block form in fp64 under
autograd; the yardstick (mamba2_cuda.reference.yardstick) is what rounding the operands of matrix
products to bf16 costs by itself. Weak, usual and strong decay: |delta A| about 1e-4, 0.3 and 5.
"""

import math

import torch

from bench import command, rows
from bench.rivals import install_mamba_ssm
from mamba2_cuda import __version__, reference, ssd_scan
from mamba2_cuda.reference.yardstick import yardstick

DECAYS = {"weak": 1e-4, "usual": 0.3, "strong": 5.0}
MEAN_DELTA = 0.1
SIZES = {"b": 2, "l": 4096, "h": 16, "p": 64, "g": 1, "n": 128}
GRADIENT = {"x": "dx", "dt": "d_dt", "A": "dA", "B": "dB", "C": "dC", "D": "dD",
            "dt_bias": "d_dt_bias", "initial_states": "d_initial_states"}  # fmt: skip
OURS, RIVAL, YARDSTICK = "mamba2_cuda", "mamba_ssm", "yardstick"


def main():
    options = parse_options()
    common = {"graph": False, **command.begin("accuracy", options)}
    scans = scans_of(options.impls, options.mamba_ssm)
    measured = []
    for decay in DECAYS:
        measured += [{**row, **common} for row in errors_at(decay, scans)]
        print(markdown([row for row in measured if row["decay"] == decay]), flush=True)
    if not options.unchecked:
        rows.add(options.results / "h200_accuracy.json", measured)


def parse_options():
    parser = command.parser("accuracy", __doc__, "h200_accuracy.json")
    command.add_mamba_ssm(parser)
    parser.add_argument("--impls", nargs="+", choices=(OURS, RIVAL), default=[OURS, RIVAL])
    return parser.parse_args()


def scans_of(names, mamba_ssm_folder):
    """(name, version, function with ssd_scan's keywords) of what is compared."""
    scans = []
    if OURS in names:
        scans.append((OURS, __version__, ssd_scan))
    if RIVAL in names:
        version = install_mamba_ssm(mamba_ssm_folder)
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        scans.append((RIVAL, version, lambda **kw: mamba_chunk_scan_combined(**kw, chunk_size=256)))
    return scans


def errors_at(decay, scans):
    """Rows (op, decay, impl, result, error) of every result of every implementation."""
    inputs, dy, d_final = problem(decay)
    wide = {k: v.double() for k, v in inputs.items()}
    truth = run(reference.ssd_scan, wide, dy.double(), d_final.double())
    options = {"dt_softplus": True, "dt_limit": (0.0, math.inf)}
    found = [(YARDSTICK, "", yardstick({**inputs, **options}, dy, d_final, operand=dy.dtype))]
    found += [(name, version, run(scan, inputs, dy, d_final)) for name, version, scan in scans]
    sizes = " ".join(f"{k}{v}" for k, v in SIZES.items())
    for name, version, results in found:
        for result, true in truth.items():
            error = (results[result].double() - true).norm() / true.norm()
            yield {"op": f"ssd_error_{result}_{decay}", "shape": sizes, "dtype": "bf16",
                   "impl": name, "version": version, "result": result, "decay": decay,
                   "error": float(f"{error.item():.3e}")}  # fmt: skip


def problem(decay, seed=0):
    random = torch.Generator("cuda").manual_seed(seed)
    b, l, h, p, g, n = SIZES.values()

    def normal(*size, dtype=torch.bfloat16, scale=1.0, mean=0.0):
        v = torch.randn(*size, generator=random, device="cuda", dtype=torch.float64)
        return (mean + scale * v).to(dtype)

    A = -DECAYS[decay] / MEAN_DELTA * normal(h, dtype=torch.float32, scale=0.3).exp()
    raw = math.log(math.expm1(MEAN_DELTA))
    inputs = {
        "x": normal(b, l, h, p),
        "dt": normal(b, l, h, scale=0.5, mean=raw),
        "A": A,
        "B": normal(b, l, g, n),
        "C": normal(b, l, g, n),
        "D": normal(h, dtype=torch.float32),
        "dt_bias": normal(h, dtype=torch.float32, scale=0.15),
        "initial_states": normal(b, h, p, n, dtype=torch.float32),
    }
    return inputs, normal(b, l, h, p), normal(b, h, p, n, dtype=torch.float32)


def run(scan, inputs, dy, d_final):
    """Outputs and gradients by name, under autograd."""
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    y, final_states = scan(**leaves, dt_softplus=True, return_final_states=True)
    gradients = torch.autograd.grad((y, final_states), list(leaves.values()), (dy, d_final))
    results = {"y": y.detach(), "final_states": final_states.detach()}
    return results | {GRADIENT[k]: v for k, v in zip(leaves, gradients)}


def markdown(measured):
    """One line for each implementation, one column for each result."""
    results = list(dict.fromkeys(row["result"] for row in measured))
    decay = measured[0]["decay"]
    lines = [f"| {decay} decay | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    for impl in dict.fromkeys(row["impl"] for row in measured):
        cells = {row["result"]: f"{row['error']:.1e}" for row in measured if row["impl"] == impl}
        lines.append(f"| {impl} | " + " | ".join(cells[result] for result in results) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
