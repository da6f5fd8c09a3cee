"""The paper's benchmark figure (figure 10) with our line in it: time against length and state size.

python -m bench.figure [bench/results/h200_sweep.json [ssd_sweep.png]]     draws rows anew
"""

from pathlib import Path

from bench import rows

RESULTS = Path(__file__).resolve().parent / "results"
LABELS = {
    "mamba2_cuda": "mamba2_cuda",
    "mamba2_cuda_sm80": "mamba2_cuda, tier sm80",
    "mamba_ssm": "mamba_ssm (Triton)",
    "sdpa_flash": "FlashAttention-2",
    "sdpa_cudnn": "cuDNN attention",
}
# first letter of the shape's name, direction, what the axis says, title
PANELS = (
    ("l", "fwd", "length, 65536 tokens in all", "forward"),
    ("l", "bwd", "length, 65536 tokens in all", "backward"),
    ("n", "fwd", "state size n, 8 x 4096 tokens", "forward"),
)


def lines(measured, prefix, op):
    """The points (length or state size, ms) of every implementation, by name."""
    found = {}
    for row in measured:
        if row["shape"][0] == prefix and row["op"].endswith(op):
            found.setdefault(row["impl"], {})[int(row["shape"][1:])] = row["ms"]
    return {name: sorted(found[name].items()) for name in LABELS if name in found}


def draw(measured, path):
    """Draws the rows of `bench.run --sweep` to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, every_axes = pyplot.subplots(1, len(PANELS), figsize=(14, 4.2), layout="constrained")
    for axes, (prefix, op, label, title) in zip(every_axes, PANELS):
        for name, points in lines(measured, prefix, op).items():
            color, width = f"C{list(LABELS).index(name)}", 3 if name == "mamba2_cuda" else 1
            axes.plot(*zip(*points), "o-", color=color, linewidth=width, label=LABELS[name])
        axes.set_xscale("log", base=2)
        axes.set(xlabel=label, ylabel="ms", title=title)
        axes.set_yscale("log") if prefix == "l" else axes.set_ylim(0)
        axes.legend()
    of = {f"{row['gpu']}, torch {row['torch']}, commit {row['commit'][:7]}" for row in measured}
    head = "SSD: 80 heads of 64, n 128; attention: 20 heads of 128; bf16"
    figure.suptitle(f"{head}. {', '.join(sorted(of))}")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    source, target = RESULTS / "h200_sweep.json", RESULTS / "ssd_sweep.png"
    of_commit = rows.load(source)[-1]["commit"]  # the newest sweep alone
    draw([row for row in rows.load(source) if row["commit"] == of_commit], target)
