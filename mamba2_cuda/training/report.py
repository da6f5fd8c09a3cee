"""What a run says and leaves: log.jsonl with a line for every step, loss.png, a progress bar."""

import importlib.util
import json
import sys
import time

from mamba2_cuda.model.checkpoint import replace


class Log:
    """log.jsonl: {"step": 12, "loss": ..., ...} a line; steps after `step` are forgotten."""

    def __init__(self, path, step=0):
        self.path, self.lines = path, []
        if path.exists():
            read = map(parse, path.read_text(errors="replace").splitlines())
            self.lines = [line for line in read if line is not None and line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        replace(path, lambda part: part.write_text(text))

    def add(self, **line):
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def column(self, name):
        """(steps, values) of the lines that have it."""
        found = [(line["step"], line[name]) for line in self.lines if name in line]
        return [step for step, _ in found], [value for _, value in found]


def parse(line):
    """A line of the log; None for what a killed run, or a fallen machine, has left of one."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and "step" in content else None


def can_plot():
    """Whether matplotlib, which draws, is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(log, path):
    """The losses of training and held-out text over steps, drawn by matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*log.column("loss"), linewidth=0.8, alpha=0.6, label="training batch")
    axes.plot(*log.column("held_out_loss"), marker="o", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


class ProgressBar:
    """One line, rewritten on a terminal; elsewhere a new one every ten seconds."""

    def __init__(self, steps, file=None):
        self.steps, self.file, self.shown = steps, file or sys.stderr, 0.0

    def show(self, step, line):
        terminal, now = self.file.isatty(), time.perf_counter()
        last = step == self.steps
        if not last and now - self.shown < (0.1 if terminal else 10.0):
            return
        self.shown, done = now, round(30 * step / self.steps)
        remaining = (self.steps - step) * line["seconds_per_step"]
        text = (
            f"[{'#' * done}{'.' * (30 - done)}] {step}/{self.steps}  loss {line['loss']:.4f}  "
            f"{line['tokens_per_second']:,.0f} tokens/s  {remaining:,.0f} s left"
        )
        end = "\n" if last or not terminal else ""
        print(f"\r{text:90}" if terminal else text, end=end, file=self.file, flush=True)
