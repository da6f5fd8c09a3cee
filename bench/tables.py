"""Writes the tables of README.md and docs from the rows of bench/results.

    python -m bench.tables            fills what stands between <!-- rows: NAME --> and <!-- end -->
    python -m bench.tables --check    fails where that is not what the rows say

Every number is the newest one, of the operator the newest that was measured beside mamba_ssm in one
run; the line above a table says of which commits its numbers are.
"""

import re
import sys
from pathlib import Path

from bench import rows
from bench.shapes import LAUNCH_BOUND, SHAPES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
OURS, SM80, RIVAL = "mamba2_cuda", "mamba2_cuda_sm80", "mamba_ssm"
BLOCK = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MODEL = {
    "mixer_fwd": "mixer, forward",
    "mixer_train": "mixer, forward and backward",
    "mixer_fwd_host": "mixer, the host's time of a forward",
    "train_step": "training step",
    "generate": "generation",
}
ATTENTION = {"sdpa_flash": "FlashAttention-2", "sdpa_cudnn": "cuDNN's attention"}


class Measured:
    """The newest rows of a file, `compared`: that have a ratio to the rival; and those used."""

    def __init__(self, path, compared=True):
        self.rows = rows.load(path)
        self.newest = {
            (row["op"], row["shape"], row["graph"]): row
            for row in self.rows
            if row["impl"] == OURS and ("ratio" in row or not compared)
        }
        self.used = []

    def ours(self, op, shape, graph=False):
        row = self.newest.get((op, shape, graph))
        self.used += [row] if row else []
        return row

    def other(self, ours, impl):
        """The row of another implementation in the run of one of ours, or None."""
        same = [
            row for row in self.rows if ours and row["impl"] == impl and work(row) == work(ours)
        ]
        return same[-1] if same else None

    def provenance(self):
        """Card, torch, rival and commits of the rows used."""

        def every(values):
            return ", ".join(dict.fromkeys(values))

        rivals = filter(None, (self.other(row, RIVAL) for row in self.used))
        versions = every(rival["version"] for rival in rivals)
        beside = f", beside mamba_ssm {versions}" if versions else ""
        commits = every(row["commit"][:7] for row in self.used)
        gpus, torches = (every(row[key] for row in self.used) for key in ("gpu", "torch"))
        return f"{gpus}, torch {torches}{beside}; commit {commits}"


def work(row):
    return row["op"], row["shape"], row["graph"], row["commit"]


def speed():
    """Forward and backward at every shape, and the attention of a model of the same width."""
    measured = Measured(RESULTS / "h200.json")
    table = [("shape (b, l, h, p, g, n)", "forward, ms", "mamba_ssm", "backward, ms", "mamba_ssm")]
    for shape, graph in ways():
        ours = [measured.ours(op, shape.name, graph) for op in ("ssd_fwd", "ssd_bwd")]
        sizes = ", ".join(map(str, (shape.b, shape.l, shape.h, shape.p, shape.g, shape.n)))
        name = f"{sizes}, CUDA graph" if graph else sizes
        table.append((name, *(cell for row in ours for cell in (ms(row), times(row)))))
    return f"{measured.provenance()}.\n\n{markdown(table)}" + attention(measured)


def attention(measured):
    long = measured.ours("ssd_fwd", "2.7b_b2_l16k")
    faster = [f"{times(long, impl)} as fast as {name}" for impl, name in ATTENTION.items()]
    if not all(times(long, impl) for impl in ATTENTION):
        return ""
    return (
        f"\n\nIn a model of the same width the forward at 16,384 tokens is {' and '.join(faster)}."
    )


def beside():
    """The same in full: the rival's own times, forward and backward together, the portable path."""
    measured = Measured(RESULTS / "h200.json")
    ops = {"forward": "ssd_fwd", "backward": "ssd_bwd", "both": "ssd_train"}
    table = [("shape", *(head for op in ops for head in (op, RIVAL)))]
    for shape, graph in ways():
        ours = [measured.ours(op, shape.name, graph) for op in ops.values()]
        name = f"{shape.name}, graph replay" if graph else shape.name
        table.append((name, *(cell for row in ours for cell in pair(measured, row, row))))
    for shape in ("2.7b_b8_l4k", "2.7b_b1_l64k", "2.7b_b1_l2k"):
        ours = [measured.ours(op, shape) for op in ops.values()]
        portable = [measured.other(row, SM80) for row in ours]
        cells = (cell for rows in zip(ours, portable) for cell in pair(measured, *rows))
        table.append((f"tier sm80 forced, {shape}", *cells))
    return f"{measured.provenance()}; ms (ratio).\n\n{markdown(table)}"


def pair(measured, ours, row):
    """ms (ratio) of a row, and the ms of the rival that ran beside ours."""
    rival = measured.other(ours, RIVAL)
    return f"{ms(row)} ({rival['ms'] / row['ms']:.1f})" if row and rival else "", ms(rival)


def model():
    """Mixer, training step and generation."""
    measured = Measured(RESULTS / "h200_model.json", compared=False)
    table = [("what", "shape", "ms", "tokens / s", "GB", "mamba_ssm")]
    for op, shape, graph in measured.newest:
        row = measured.ours(op, shape, graph)
        tokens = f"{row['tokens_per_s']:,}" if "tokens_per_s" in row else ""
        memory = f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else ""
        of = shape.replace("_", " ")
        table.append((MODEL.get(op, op), of, f"{row['ms']:.2f}", tokens, memory, times(row)))
    return f"{measured.provenance()}.\n\n{markdown(table)}"


def sweep():
    """The figure, where there is one."""
    if not (RESULTS / "ssd_sweep.png").exists():
        return "No figure is in bench/results yet."
    return "![time against length and state size](bench/results/ssd_sweep.png)"


def ways():
    """Every shape, called plainly, and those whose launches dominate from a CUDA graph too."""
    for shape in SHAPES.values():
        yield shape, False
        if shape.name in LAUNCH_BOUND:
            yield shape, True


def ms(row):
    return f"{row['ms']:.3f}" if row else ""


def times(row, impl=RIVAL):
    ratios = (row or {}).get("ratios", {})
    return f"{ratios[impl]:.1f}x" if impl in ratios else ""


def markdown(table):
    head, *lines = ("| " + " | ".join(cells) + " |" for cells in table)
    return "\n".join([head, "|---" * len(table[0]) + "|", *lines])


TABLES = {"speed": speed, "beside": beside, "model": model, "sweep": sweep}


def filled(text):
    """The text with every block as its rows have it."""
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}\n{block[3]}", text)


def documents():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(check):
    stale = [path for path in documents() if filled(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{path.name}: {'not what the rows say' if check else 'filled'}")
        if not check:
            path.write_text(filled(path.read_text()))
    return bool(stale and check)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
