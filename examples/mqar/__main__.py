"""Associative recall: which mixers remember many pairs, and with how large a state.

  python -m examples.mqar --mixer mamba2 --d-model 64 --d-state 64     one model
  python -m examples.mqar --grid                                       all, a table and a plot

Two layers; every step draws new sequences. Leaves results.jsonl, table.md and mqar.png in --out.
A full run of the paper is 2^18 examples 8 times over for each of four stages; --steps is what one
has time for, and stands beside every result.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from examples.mqar.models import MIXERS, Recall
from examples.mqar.task import draw, pairs_at

GRID = [("attention", 0), ("mamba1", 16), ("mamba2", 16), ("mamba2", 64), ("mamba2", 256)]
GRID_WIDTHS = (64, 128)


def main(arguments=None):
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.grid:
        runs = [(kind, d, n) for kind, n in GRID for d in GRID_WIDTHS]
    else:
        runs = [(options.mixer, options.d_model, options.d_state)]
    for kind, d_model, d_state in runs:
        results = [train(kind, d_model, d_state, rate, options) for rate in options.rates]
        best = max(results, key=lambda result: result["accuracy"])
        with (options.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(best) + "\n")
    rows = [json.loads(row) for row in (options.out / "results.jsonl").read_text().splitlines()]
    (options.out / "table.md").write_text(table(rows))
    plot(rows, options.out / "mqar.png")
    return 0


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m examples.mqar", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--grid", action="store_true", help="every mixer, width and state")
    parser.add_argument("--mixer", choices=MIXERS, default="mamba2")
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--d-state", type=int, default=64)
    parser.add_argument("--length", type=int, default=256, help="tokens (256)")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1024, help="sequences a step (1024)")
    parser.add_argument("--steps", type=int, default=1600, help="over all four stages (1600)")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 10**-2.5],
                        help="learning rates to try; the best counts")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/mqar"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device)
    return parser.parse_args(arguments)


def train(kind, d_model, d_state, rate, options):
    """Trains one model; returns its row: what it is, how it was trained, its accuracy."""
    torch.manual_seed(options.seed)
    random = torch.Generator().manual_seed(options.seed)
    model = Recall(kind, d_model, d_state, options.vocab, options.length).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    begin = time.perf_counter()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / options.steps)
        pairs = pairs_at(step, options.steps, options.length)
        logits, answers = answer(model, pairs, options, random)
        loss = F.cross_entropy(logits.float().flatten(0, 1), answers.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            said = f"{kind} d {d_model} n {d_state} rate {rate:.1e}: step {step}, {pairs} pairs"
            print(f"{said}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    row = {
        "mixer": kind, "d_model": d_model, "d_state": d_state, "rate": rate,
        "length": options.length, "pairs": options.length // 4, "vocab": options.vocab,
        "batch": options.batch, "steps": options.steps, "accuracy": accuracy(model, options),
        "seconds": round(time.perf_counter() - begin, 1), "device": options.device,
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


def answer(model, pairs, options, random):
    """The model's logits at the queries of new sequences, and the right answers."""
    drawn = draw(options.batch, options.length, pairs, options.vocab, random)
    tokens, queries, answers = (v.to(options.device) for v in drawn)
    half = torch.device(options.device).type == "cuda"
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        return model(tokens, queries), answers


@torch.no_grad()
def accuracy(model, options, batches=4):
    """The share of right answers with a quarter as many pairs as tokens, on unseen sequences."""
    model.eval()
    random, right = torch.Generator().manual_seed(options.seed + 1), 0.0
    for _ in range(batches):
        logits, answers = answer(model, options.length // 4, options, random)
        right += (logits.argmax(-1) == answers).float().mean().item()
    return right / batches


def table(rows):
    lines = ["| mixer | state n | d | accuracy | steps x batch |", "|---|---|---|---|---|"]
    for row in rows:
        state = row["d_state"] if row["mixer"] != "attention" else "-"
        lines.append(
            f"| {row['mixer']} | {state} | {row['d_model']} | {row['accuracy']:.3f} "
            f"| {row['steps']} x {row['batch']} |"
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
