"""`make demo`: builds for this machine, trains, and shows what came of it.

    python -m examples.byte_lm [--build] [--out FOLDER] [--steps N] [--seconds S]

With no GPU: a CPU-only build and a small model, under 5 minutes on 2 cores. With a GPU: a build for
that card and a larger model on the CUDA kernels. Leaves loss.png, sample.txt and result.json.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from examples.byte_lm.corpus import standard_library

ROOT = Path(__file__).resolve().parents[2]
GOAL = 3.0  # bits per byte on held-out files
PROMPT = b'def read_file(path, encoding="utf-8"):\n    """'


def main():
    options = parse_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(f"Running on {describe(device)}.")
    if options.build:
        build(device)
    # Only now: the compiled operators that these import may not have existed before.
    from examples.byte_lm.model import ByteLM
    from examples.byte_lm.train import train

    sizes, recipe = settings(device)
    recipe = dataclasses.replace(recipe, **given(options, "steps", "seconds"))
    torch.manual_seed(recipe.seed)
    model = ByteLM(sizes).to(device)
    corpus = standard_library()
    say(path_taken(sizes, recipe, device))
    say(
        f"Model: {sum(p.numel() for p in model.parameters()):,} parameters, {sizes.layers} layers. "
        f"Text: {len(corpus[0]):,} bytes to train on, {len(corpus[1]):,} held out."
    )
    history = train(model, corpus, recipe, device, say)
    sample = model.generate(PROMPT, 400, generator=torch.Generator().manual_seed(1))
    return present(history, sample, device, Path(options.out))


def parse_options():
    parser = argparse.ArgumentParser(prog="python -m examples.byte_lm", description=__doc__)
    parser.add_argument("--build", action="store_true", help="build for this machine first")
    parser.add_argument("--out", default=ROOT / "out/demo", help="folder for the results")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--seconds", type=float, help="most time to train for")
    return parser.parse_args()


def given(options, *names):
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def say(text):
    print(text, flush=True)


def describe(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads (torch sees no GPU)"


def build(device):
    """Builds in place for this machine alone: its card, or the CPU."""
    environment = dict(os.environ, MAMBA2_CUDA="0")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        arch = f"{major}.{minor}{'a' if (major, minor) == (9, 0) else ''}"
        environment.update(MAMBA2_CUDA="1", TORCH_CUDA_ARCH_LIST=arch)
    what = f"compute capability {arch}" if device.type == "cuda" else "the CPU alone"
    say(f"Building for {what} ...")
    start, log = time.perf_counter(), ROOT / "build/demo.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    with log.open("w") as out:
        run = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
        )
    if run.returncode:
        raise SystemExit(f"the build failed; the end of {log}:\n{log.read_text()[-3000:]}")
    say(f"Built in {time.perf_counter() - start:.0f} s.")


def settings(device):
    from examples.byte_lm.model import Sizes
    from examples.byte_lm.train import Recipe

    if device.type == "cuda":
        recipe = Recipe(steps=1500, batch=8, length=2048, rate=1.5e-3, seconds=300)
        return Sizes(d_model=512, layers=8, p=64, n=128), recipe
    recipe = Recipe(steps=500, batch=8, length=256, rate=4e-3, seconds=200)
    return Sizes(d_model=128, layers=4, p=32, n=32), recipe


def path_taken(sizes, recipe, device):
    """One sentence on what ssd_scan runs on here."""
    if device.type == "cpu":
        return "ssd_scan runs as C++ loops on the CPU, forward and backward."
    from mamba2_cuda import explain

    plan = explain(
        b=recipe.batch, l=recipe.length, h=sizes.h, p=sizes.p, g=sizes.g, n=sizes.n, device=device
    )
    return f"ssd_scan runs on CUDA kernels, tier {plan['tier']}: {plan['reason']}."


def present(history, sample, device, out):
    """Prints and saves the outcome; returns the exit status: 0 when the goal was reached."""
    out.mkdir(parents=True, exist_ok=True)
    final = history.validation[-1]
    plot(history, out / "loss.png")
    (out / "sample.txt").write_bytes(sample)
    result = {
        "device": describe(device),
        "held_out_bits_per_byte": round(final, 4),
        "steps": history.steps[-1],
        "seconds": round(history.seconds, 1),
        "tokens_per_second": round(history.tokens_per_second),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    say("\nA sample:\n" + sample.decode("utf-8", "replace"))
    reached = final < GOAL
    say(
        f"\n{final:.3f} bits per byte on held-out files ({'below' if reached else 'NOT below'} "
        f"{GOAL}) after {history.seconds:.0f} s at {history.tokens_per_second:,.0f} tokens/s, on "
        f"{describe(device)}.\nLoss curve: {out / 'loss.png'}"
    )
    return 0 if reached else 1


def plot(history, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(history.steps, history.train, linewidth=0.8, alpha=0.6, label="training batch")
    axes.plot(history.validated, history.validation, marker="o", label="held-out files")
    axes.axhline(GOAL, linestyle="--", linewidth=0.8, color="grey", label="goal")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(1, 8), title="Mamba-2 on bytes")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
