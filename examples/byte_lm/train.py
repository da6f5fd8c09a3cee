"""The training loop: random windows, AdamW, warm-up and cosine, validation in bits per byte."""

import math
import sys
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from examples.byte_lm.corpus import windows


@dataclass(frozen=True)
class Recipe:
    steps: int
    batch: int
    length: int  # bytes in a window
    rate: float  # peak learning rate
    seconds: float  # the schedule ends here at the latest
    warmup: float = 0.03  # share of the schedule
    validate_every: int = 50
    validation_windows: int = 32
    seed: int = 0


@dataclass
class History:
    steps: list = field(default_factory=list)
    train: list = field(default_factory=list)  # bits per byte, each step
    validated: list = field(default_factory=list)
    validation: list = field(default_factory=list)  # bits per byte
    tokens_per_second: float = 0.0
    seconds: float = 0.0


def train(model, corpus, recipe, device, report=print):
    """Trains in place; returns the History, whose last validation is over 8 times the windows."""
    text, held_out = corpus
    random = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=recipe.rate, betas=(0.9, 0.95))
    history, start = History(), time.perf_counter()
    bar = ProgressBar(recipe.steps, report)
    step, progress, training = 0, 0.0, 0.0
    while progress < 1.0:
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * schedule(progress, recipe.warmup)
        starts = torch.randint(len(text) - recipe.length - 1, (recipe.batch,), generator=random)
        bits = loss_bits(model, *windows(text, starts, recipe.length), device)
        optimizer.zero_grad(set_to_none=True)
        bits.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        history.steps.append(step)
        history.train.append(bits.item())
        training += time.perf_counter() - begin
        history.tokens_per_second = step * recipe.batch * recipe.length / training
        history.seconds = time.perf_counter() - start
        progress = max(step / recipe.steps, history.seconds / recipe.seconds)
        if step % recipe.validate_every == 0 or progress >= 1.0:
            count = recipe.validation_windows * (8 if progress >= 1.0 else 1)
            history.validated.append(step)
            history.validation.append(validate(model, held_out, recipe, count, device))
        bar.show(step, progress, history)
    return history


def parameter_groups(model):
    """Weight decay for matrices; none for norms, biases and what shapes the decay (A, D, dt)."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "conv" not in name]
    seen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in seen]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def schedule(progress, warmup):
    """Share of the peak learning rate: linear up, then a cosine down to a tenth."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def loss_bits(model, inputs, targets, device):
    """Mean bits per byte of a batch; bf16 products on a GPU, fp32 on the CPU."""
    inputs, targets = inputs.to(device), targets.to(device)
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        logits, _ = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) / math.log(2)


@torch.no_grad()
def validate(model, held_out, recipe, count, device):
    """Bits per byte over `count` evenly spaced windows of the held-out files."""
    starts = torch.linspace(0, len(held_out) - recipe.length - 2, count).long()
    bits = [
        loss_bits(model, *windows(held_out, part, recipe.length), device).item() * len(part)
        for part in starts.split(recipe.batch)
    ]
    return sum(bits) / count


class ProgressBar:
    """One line, redrawn on a terminal; elsewhere a new line every twentieth of the way."""

    def __init__(self, total, report, width=24):
        self.total, self.report, self.width = total, report, width
        self.redraw = sys.stdout.isatty()
        self.next = 0.05

    def show(self, step, progress, history):
        """`progress` is the share of steps done, or of the time given: whichever ends it first."""
        finished = progress >= 1.0
        if not (self.redraw or finished or progress >= self.next):
            return
        self.next = math.floor(progress / 0.05 + 1) * 0.05
        done = int(self.width * min(progress, 1.0))
        validation = f"{history.validation[-1]:.3f}" if history.validation else "-"
        line = (
            f"[{'#' * done}{'.' * (self.width - done)}] step {step}/{self.total}  "
            f"train {history.train[-1]:.3f}  validation {validation} bits/byte  "
            f"{history.tokens_per_second:,.0f} tokens/s"
        )
        if finished and step < self.total:
            line += "  (time is up)"
        if self.redraw:
            print("\r" + line, end="\n" if finished else "", flush=True)
        else:
            self.report(line)
