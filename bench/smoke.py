"""A first look at every tier on a card: a few small problems, each result against its yardstick.

    python -m bench.smoke                       each tier in a process of its own, then a table
    python -m bench.smoke --tier 3 --run-only   for sanitizers: small cases, unchecked
    python -m bench.smoke --layers [bf16 fp32]  for sanitizers: what stands around the scan

A tier that hangs or breaks the CUDA context costs its own process only. Below 1.0 passes: the worst
error of any output or gradient over what the tests allow it.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(os.environ.get("OUT", ROOT / "out"))
sys.path.insert(0, str(ROOT / "tests"))
from cases import Case, make_gradients, make_inputs  # noqa: E402
from common import allowed_error, expected_error, run_ops, same_bits, truth  # noqa: E402

TIERS = {1: "any", 2: "sm80", 3: "sm90"}
SECONDS_PER_TIER = 150
LAYER_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FULL = {"D": "h", "z": True, "dt_bias": True, "initial_states": "working"}
MODEL = Case(b=1, l=192, h=4, p=64, g=1, n=128, dtype=torch.bfloat16, D="h", dt_bias=True)
CASES = {
    "model": MODEL,
    "model fp16": replace(MODEL, dtype=torch.float16),
    "all arguments": replace(MODEL, b=2, l=65, h=6, g=2, **FULL),
    "packed": replace(MODEL, l=300, cu_seqlens=(3, 70, 70, 199, 290), initial_states="working"),
    "seq_idx": replace(MODEL, l=300, seq_idx=True),
    "kept states": replace(MODEL, l=257, save_states=True),
    "sliced": replace(MODEL, b=2, l=129, h=6, z=True, sliced=True),
    "p 128, n 256": replace(MODEL, p=128, n=256),
    "p 32, n 64": replace(MODEL, p=32, n=64, l=130),
    "p 80, n 96": replace(MODEL, p=80, n=96, l=130),
    "odd p, n": replace(MODEL, p=19, n=5, l=70),
    "long": replace(MODEL, l=4096, h=2),
    "fp32": replace(MODEL, dtype=torch.float32, l=130),
    "fp64": replace(MODEL, dtype=torch.float64, l=70, h=2),
}
# What a sanitizer runs: small, and one of each kind of addressing.
SMALL = ("model", "all arguments", "packed", "seq_idx", "kept states", "sliced", "fp32")


def main():
    options = parse_options()
    if options.layers is not None:
        return layers(options.tier or 0, options.layers or LAYER_DTYPES)
    if options.tier:
        sys.exit(one_tier(options.tier, options.cases, options.run_only))
    print_where()
    lines, status = [], 0
    for tier, name in TIERS.items():
        command = [sys.executable, "-m", "bench.smoke", "--tier", str(tier)]
        try:
            run = subprocess.run(
                command, cwd=ROOT, timeout=SECONDS_PER_TIER, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            lines.append(run.stdout)
            status |= run.returncode
        except subprocess.TimeoutExpired as late:
            said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
            lines.append(f"{said}{name}: HANGS, stopped after {SECONDS_PER_TIER} s\n")
            status = 1
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "smoke.log").write_text("".join(lines))
    print("".join(lines) + ("all good" if status == 0 else "NOT all good"))
    sys.exit(status)


def parse_options():
    parser = argparse.ArgumentParser(prog="python -m bench.smoke", description=__doc__)
    parser.add_argument("--tier", type=int, choices=TIERS)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--run-only", action="store_true", help="the small cases, unchecked")
    parser.add_argument(
        "--layers", nargs="*", choices=LAYER_DTYPES, help="a small model, unchecked"
    )
    options = parser.parse_args()
    if options.run_only:
        options.cases = [name for name in options.cases if name in SMALL]
    return options


def layers(tier, dtypes):
    """A model forward, backward, and token by token: one row (fused steps), and several."""
    from mamba2_cuda.model import Mamba2LMHeadModel, ModelConfig, generate
    from mamba2_cuda.ops.plan import force_plan

    force_plan(tier)
    sizes = dict(d_model=128, n_layer=2, vocab_size=64, ssm_cfg=dict(d_state=64))
    for dtype in (LAYER_DTYPES[name] for name in dtypes):
        model = Mamba2LMHeadModel(ModelConfig(**sizes), dtype=dtype).cuda()
        logits = model(torch.randint(0, 64, (2, 150), device="cuda"))
        logits.float().square().sum().backward()
        for prompts in ([[1, 2, 3]], [[1, 2, 3], [4], [5, 6]]):
            generate(model, prompts, 4, cuda_graph=False)
        torch.cuda.synchronize()
        print(f"layers {dtype}: ran")


def print_where():
    from mamba2_cuda._load import load_ops

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"{card}; Python {python}, torch {torch.__version__}; {load_ops().name} loads")


def one_tier(tier, names, run_only):
    """Runs the cases with the tier forced; prints a line for each; 1 when one fails."""
    from mamba2_cuda._load import load_ops

    load_ops()
    run, status, worst_of = run_ops(torch.ops.mamba2_cuda, plan=tier), 0, {}
    for name in names:
        try:
            ratio, worst = attempt(run, CASES[name], run_only)
        except Exception as failure:  # whatever it is, the line says so and the exit status too
            ratio, worst = float("inf"), f"{type(failure).__name__}: {str(failure)[:150]}"
        good = ratio <= 1.0
        status |= not good
        worst_of[name] = (ratio, worst)
        verdict = "ok" if good else "FAILED"
        print(f"{TIERS[tier]:5} {name:14} {ratio:8.3f} {verdict:6} {worst}", flush=True)
    if not run_only:
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / f"smoke_{TIERS[tier]}.json").write_text(json.dumps(worst_of, indent=1) + "\n")
    return int(status)


def attempt(run, case, run_only):
    """The worst share of the allowed error, and whose it is; the same bits twice."""
    inputs, (dy, d_final) = make_inputs(case, "cuda"), make_gradients(case, "cuda")
    results = run(inputs, dy, d_final, case.save_states)
    torch.cuda.synchronize()
    if run_only:
        return 0.0, "not checked"
    same_bits(results, run(inputs, dy, d_final, case.save_states), "the second run")
    expected, errors = truth(case, "cuda"), expected_error(case, "cuda")
    shares = {}
    for name, true in expected.items():
        allowed = allowed_error(name, inputs, true, errors[name])
        error = (results[name].double() - true).norm().item()
        shares[name] = error / allowed if allowed else float(error > 0)
        if error != error:
            shares[name] = float("inf")
    worst = max(shares, key=shares.get)
    return shares[worst], worst


if __name__ == "__main__":
    main()
