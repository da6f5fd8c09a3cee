"""The results: a JSON list of rows, one measurement each.

    python -m bench.rows bench/results/h200.json NEW.json...     adds the rows of NEW to the first

A row holds op, shape, dtype, impl, version, ms, gpu, torch, commit, date, and what follows from
them: tb_per_s, tflop_per_s, floor_share (the byte floor at the card's copy rate / ms), copy_share
(copy_ms, of copies of as many bytes called in the same way, / ms), ratios (each rival's ms / ours,
in the same run; ratio is mamba_ssm's), graph (replayed from a CUDA graph),
peak_extra_bytes (of a training step, beyond inputs), command.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

IDENTITY = ("op", "shape", "dtype", "impl", "version", "graph", "gpu", "cpu", "commit")


def provenance(command, commit=None):
    """When and by what a row was measured; `commit` where git cannot say."""
    commit = commit or os.environ.get("MAMBA2_COMMIT")
    if not commit:
        ask = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(ask, capture_output=True, text=True).stdout.strip() or "unknown"
    return {
        "torch": torch.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
    }


def load(path):
    return json.loads(Path(path).read_text()) if Path(path).exists() else []


def identity(row):
    return tuple(row.get(key) for key in IDENTITY)


def add(path, rows):
    """Appends rows; a later measurement of the same thing at the same commit replaces the old."""
    newest = {identity(row): row for row in [*load(path), *rows]}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(" " + json.dumps(row) for row in newest.values())
    Path(path).write_text(f"[\n{lines}\n]\n")


def table(rows):
    """The rows as text, one line each."""
    head = f"{'shape':18} {'op':14} {'impl':12} {'graph':5} {'ms':>8} {'TB/s':>6} "
    lines = [head + f"{'TFLOP/s':>8} {'floor':>6} {'ratio':>6}"]
    for row in rows:
        lines.append(
            f"{row['shape']:18} {row['op']:14} {row['impl']:12} {'yes' if row['graph'] else '':5} "
            f"{row['ms']:8.3f} {cell(row, 'tb_per_s', 6)} {cell(row, 'tflop_per_s', 8, 0)} "
            f"{cell(row, 'floor_share', 6)} {cell(row, 'ratio', 6)}"
        )
    return "\n".join(lines)


def cell(row, key, width, digits=2):
    return f"{row[key]:{width}.{digits}f}" if row.get(key) is not None else " " * width


if __name__ == "__main__":
    for new in sys.argv[2:]:
        add(sys.argv[1], load(new))
