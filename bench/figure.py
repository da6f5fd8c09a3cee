"""The paper's benchmark figure (figure 10) with our line in it: time against length and state."""


def draw(measured, path):
    """Draws the rows of `bench.run --sweep` to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_length, backward, by_state) = pyplot.subplots(
        1, 3, figsize=(14, 4.2), layout="constrained"
    )
    panels = (
        (by_length, "l", "fwd", "length, 65536 tokens in all", "forward"),
        (backward, "l", "bwd", "length, 65536 tokens in all", "backward"),
        (by_state, "n", "fwd", "state size n, 8 x 4096 tokens", "forward"),
    )
    for axes, prefix, op, label, title in panels:
        for name in sorted({row["impl"] for row in measured}):
            points = [
                (int(row["shape"][1:]), row["ms"])
                for row in measured
                if row["impl"] == name and row["shape"][0] == prefix and row["op"].endswith(op)
            ]
            if points:
                ours = name == "mamba2_cuda"
                axes.plot(*zip(*sorted(points)), marker="o", label=name, linewidth=3 if ours else 1)
        axes.set_xscale("log", base=2)
        axes.set(xlabel=label, ylabel="ms", title=title)
        if prefix == "l":
            axes.set_yscale("log")
        axes.legend()
    gpus = {f"{row['gpu']}, torch {row['torch']}, {row['date']}" for row in measured}
    figure.suptitle(f"SSD: 80 heads of 64; attention: 20 heads of 128; bf16. {' '.join(gpus)}")
    figure.savefig(path, dpi=130)
