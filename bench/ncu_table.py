"""Reads `ncu --csv --page raw` and prints one line for each kernel.

python -m bench.ncu_table out/ncu.csv [out/ncu.json]
"""

import csv
import json
import re
import sys
from pathlib import Path

# Column of the table -> patterns of ncu's metric names, first match first, and a factor.
COLUMNS = {
    "ms": ([r"gpu__time_duration\.sum"], {"ns": 1e-6, "us": 1e-3, "ms": 1, "s": 1e3}),
    "HBM %": ([r"(gpu__)?dram_{1,2}throughput\.avg\.pct_of_peak_sustained_elapsed"], {}),
    "tensor %": (
        [
            r"sm__pipe_tensor\w*_cycles_active\.avg\.pct_of_peak_sustained_active",
            r"sm__inst_executed_pipe_tensor\w*\.avg\.pct_of_peak_sustained_active",
        ],
        {},
    ),
    "issue %": (
        [
            r"sm__inst_issued\.avg\.pct_of_peak_sustained_active",
            r"sm__inst_executed\.avg\.pct_of_peak_sustained_active",
            r"smsp__issue_active\.avg\.pct_of_peak_sustained_active",
        ],
        {},
    ),
    "L1/smem %": ([r"l1tex__throughput\.avg\.pct_of_peak_sustained_active"], {}),
    "occup. %": ([r"sm__warps_active\.avg\.pct_of_peak_sustained_active"], {}),
    "regs": ([r"launch__registers_per_thread"], {}),
    "smem KB": (
        [r"launch__shared_mem_per_block_dynamic", r"launch__shared_mem_per_block"],
        {"byte/block": 1 / 1024, "Kbyte/block": 1, "byte": 1 / 1024, "Kbyte": 1},
    ),
    "blocks": ([r"launch__grid_size"], {}),
}
STALL = re.compile(r"smsp__average_warps?_issue_stalled_(\w+?)(_per_issue_active|_not_issued)")


def parse(path):
    """One dict for each kernel launch of ncu's CSV, in order."""
    text = [line for line in Path(path).read_text().splitlines() if line.startswith('"')]
    table = list(csv.reader(text))
    head, units, launches = table[0], table[1], table[2:]
    return [summary(head, units, launch) for launch in launches]


def summary(head, units, launch):
    kernel = {"kernel": short_name(launch[head.index("Kernel Name")])}
    for column, (patterns, factors) in COLUMNS.items():
        kernel[column] = largest(patterns, factors, head, units, launch)
    kernel["stall"] = top_stall(head, launch)
    return kernel


def short_name(name):
    name = re.sub(r"\(anonymous namespace\)::|<?unnamed>::", "", name)
    name = re.sub(r"\(.*", "", name).removeprefix("void ")
    return re.sub(r"\b(mamba2|ssd)::", "", name)


def largest(patterns, factors, head, units, launch):
    """The largest value among the metrics of the first pattern that the report holds."""
    for pattern in patterns:
        values = [
            number(launch[i]) * factors.get(units[i], 1)
            for i, name in enumerate(head)
            if re.fullmatch(pattern, name) and number(launch[i]) is not None
        ]
        if values:
            return round(max(values), 4)
    return None


def number(text):
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def top_stall(head, launch):
    """What warps mostly wait for."""
    waits = {
        found[1]: number(launch[i])
        for i, name in enumerate(head)
        if (found := STALL.match(name)) and number(launch[i]) is not None
    }
    waits = {reason: value for reason, value in waits.items() if "selected" not in reason}
    return max(waits, key=waits.get) if waits else ""


def markdown(kernels):
    columns = ["kernel", *COLUMNS, "stall"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for kernel in kernels:
        cells = [cell(kernel[column]) for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(value):
    return "" if value is None else value if isinstance(value, str) else f"{value:.3g}"


if __name__ == "__main__":
    found = parse(sys.argv[1])
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(found))
