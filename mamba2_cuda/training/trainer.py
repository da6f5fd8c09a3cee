"""The training loop."""

import dataclasses
import time
from pathlib import Path

import torch

from mamba2_cuda.model import CheckpointError, save_model

from .events import EventFile
from .recipe import make_optimizer
from .report import Log, ProgressBar, can_plot, plot
from .run_state import load_state, newest_state, save_state, states


class Trainer:
    """Trains `model` on `windows` by `recipe`, into the folder `out`.

    out/checkpoints/   what a killed run goes on from, every recipe.save_every steps
    out/log.jsonl      a line a step; the same for TensorBoard in out/tensorboard/
    out/loss.png       the losses
    out/model/         the result

    A run that goes on does what the uninterrupted one would have done, bit for bit: weights,
    moments, step (which is the place in the data) and the states of the random generators are kept.
    """

    def __init__(self, model, recipe, windows, held_out, out):
        self.model, self.recipe, self.out = model, recipe, Path(out)
        self.windows, self.held_out = windows, held_out
        self.device = model.lm_head.weight.device
        self.optimizer = make_optimizer(model, recipe)
        model.backbone.activation_checkpointing = recipe.activation_checkpointing
        self.step = 0

    def run(self, resume=False, progress=None):
        """Trains to the last step; returns the Log.

        resume: from the newest checkpoint, or the start if the run was stopped before its first.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        if resume and states(self.out / "checkpoints"):
            newest = newest_state(self.out / "checkpoints")
            state = load_state(newest)
            try:
                self.restore(state)
            except (RuntimeError, KeyError) as cause:
                what = " ".join(str(cause).split())
                raise CheckpointError(f"{newest}: not of this run's model: {what}") from cause
        log = Log(self.out / "log.jsonl", self.step)
        events = EventFile(self.out / "tensorboard")
        bar = ProgressBar(self.recipe.steps, progress)
        while self.step < self.recipe.steps:
            line = self.train_step()
            last = self.step == self.recipe.steps
            if last or self.step % self.recipe.validate_every == 0:
                line["held_out_loss"] = self.validate()
            log.add(**line)
            events.add(self.step, {k: v for k, v in line.items() if k != "step"})
            if last or self.step % self.recipe.save_every == 0:
                save_state(self.out / "checkpoints", self.step, self.state())
            if "held_out_loss" in line and can_plot():
                plot(log, self.out / "loss.png")
            bar.show(self.step, line)
        save_model(self.model, self.out / "model")
        return log

    def train_step(self):
        """One step of the optimizer; returns the line of the log."""
        begin, recipe = time.perf_counter(), self.recipe
        rate = recipe.rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        inputs, targets = self.windows.batch(self.step * recipe.batch, recipe.batch)
        total = 0.0
        for part in zip(inputs.chunk(recipe.accumulate), targets.chunk(recipe.accumulate)):
            loss = self.loss(*part) / recipe.accumulate
            loss.backward()
            total = total + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        total = total.item()  # waits for the device
        seconds = time.perf_counter() - begin
        return {
            "step": self.step,
            "loss": total,
            "rate": rate,
            "gradient_norm": norm.item(),
            "seconds_per_step": seconds,
            "tokens_per_second": inputs.numel() / seconds,
        }

    def loss(self, inputs, targets):
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            return self.model.loss(inputs, targets)

    @torch.no_grad()
    def validate(self):
        """The mean loss over the same windows of held-out text every time."""
        self.model.eval()
        count = min(self.recipe.validation_windows, self.held_out.per_epoch)
        inputs, targets = self.held_out.batch(0, count)
        size = max(1, self.recipe.batch // self.recipe.accumulate)
        parts = zip(inputs.split(size), targets.split(size))
        return sum(self.loss(*part).item() * len(part[0]) for part in parts) / count

    def state(self):
        cuda = self.device.type == "cuda"
        return {
            "step": self.step,
            "recipe": dataclasses.asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def restore(self, state):
        recipe = {**dataclasses.asdict(self.recipe), "betas": list(self.recipe.betas)}
        saved = {**state["recipe"], "betas": list(state["recipe"]["betas"])}
        if changed := sorted(k for k in recipe if recipe[k] != saved.get(k)):
            raise ValueError(f"the run to go on with had another {', '.join(changed)}")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
