"""Associative recall: which mixers remember many pairs, and with how large a state.

  python -m examples.mqar --mixer mamba2 --d-model 64 --d-state 64     one model
  python -m examples.mqar --grid --budget-seconds 200                  all, a table and a plot
  python -m examples.mqar --draw                                       of results that are there

Two layers; every step draws new sequences. Leaves results.jsonl, table.md and mqar.png in --out.
A full run of the paper is 2^18 examples 8 times over for each of four stages. --steps, or
--budget-seconds shared by all models and rates, is what one has time for; the examples that
a model saw stand beside its result.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from examples.mqar.models import MIXERS
from examples.mqar.train import train

# Mixer, state, rates to try, and the share of the seconds: a step of Mamba-1, in plain PyTorch,
# takes ten times as long as one of Mamba-2.
GRID = [
    ("attention", 0, (1e-3, 3e-3), 2),
    ("mamba1", 16, (1e-2,), 3),
    ("mamba2", 16, (3e-3, 1e-2), 2.5),
    ("mamba2", 64, (3e-3, 1e-2), 2.5),
    ("mamba2", 256, (3e-3, 1e-2), 3),
]
GRID_WIDTHS = (64, 128)


def main(arguments=None):
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.draw:
        runs = []
    elif options.grid:
        runs = [(kind, d, n, rates, share) for kind, n, rates, share in GRID for d in GRID_WIDTHS]
    else:
        runs = [(options.mixer, options.d_model, options.d_state, (3e-3,), 1)]
    shares = sum(share for *_, share in runs)
    for kind, d_model, d_state, rates, share in runs:
        rates, seconds = options.rates or rates, None
        if options.budget_seconds is not None:
            seconds = options.budget_seconds * share / shares / len(rates)
        results = [train(kind, d_model, d_state, rate, options, seconds) for rate in rates]
        best = max(results, key=lambda result: result["accuracy"])
        with (options.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(best) + "\n")
    rows = [json.loads(row) for row in (options.out / "results.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (row["mixer"], row["d_state"], row["d_model"]))
    (options.out / "table.md").write_text(table(rows))
    plot(rows, options.out / "mqar.png")
    return 0


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m examples.mqar", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--grid", action="store_true", help="every mixer, width and state")
    add("--draw", action="store_true", help="table and plot of the results in --out, no training")
    add("--mixer", choices=MIXERS, default="mamba2")
    add("--d-model", type=int, default=64)
    add("--d-state", type=int, default=64)
    add("--length", type=int, default=256, help="tokens (256)")
    add("--vocab", type=int, default=8192)
    add("--batch", type=int, default=256, help="sequences a step (256)")
    add("--steps", type=int, default=8000, help="over all four stages (8000)")
    add("--budget-seconds", type=float, help="of training, for all models together")
    add("--rates", type=float, nargs="+", help="to try; the best counts (3e-3; the grid's own)")
    add("--weight-decay", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("out/mqar"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def table(rows):
    lines = ["| mixer | state n | d | accuracy | examples | rate |", "|---|---|---|---|---|---|"]
    for row in rows:
        state = row["d_state"] if row["mixer"] != "attention" else "-"
        examples = row["steps"] * row["batch"] / 1e6
        lines.append(
            f"| {row['mixer']} | {state} | {row['d_model']} | {row['accuracy']:.3f} "
            f"| {examples:.2f} M | {row['rate']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    curves = {}
    for row in rows:
        name = row["mixer"] + (f", n {row['d_state']}" if row["mixer"] != "attention" else "")
        curves.setdefault(name, {})[row["d_model"]] = row["accuracy"]
    for name, points in curves.items():
        widths = sorted(points)
        axes.plot(range(len(widths)), [points[d] for d in widths], marker="o", label=name)
        axes.set_xticks(range(len(widths)), widths)
    axes.set(xlabel="model width d", ylabel="accuracy", ylim=(0, 1.02))
    axes.set_title(f"Associative recall, {rows[0]['pairs']} pairs in {rows[0]['length']} tokens")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
