"""Training one model on associative recall, for a number of steps or for some seconds.

On CUDA a whole step, from drawing the sequences to the optimizer, is one CUDA graph: these models
are so small that launching their kernels one by one would take longer than running them.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F

from examples.mqar.models import Recall
from examples.mqar.task import draw, pairs_at
from mamba2_cuda.training.recipe import parameter_groups

LOOK_EVERY = 20  # steps between looks at the clock
WARM_UP_STEPS = 3  # before a CUDA graph is captured
WARM_UP = 0.05  # share of the training in which the learning rate rises; then it falls linearly


def train(kind, d_model, d_state, rate, options, seconds=None):
    """Trains one model; returns its row: what it is, how it was trained, its accuracy.

    seconds: how long, instead of options.steps. The time of building it comes on top.
    """
    torch.manual_seed(options.seed)
    random = torch.Generator(options.device).manual_seed(options.seed)
    model = Recall(kind, d_model, d_state, options.vocab, options.length).to(options.device)
    training = Training(model, rate, options, random)
    begin, progress, told = time.perf_counter(), 0.0, 0
    while progress < 1:
        training.step(progress)
        if seconds is None:
            progress = training.steps / options.steps
        elif training.steps % LOOK_EVERY == 0:
            training.loss.item()  # waits for the device
            progress = (time.perf_counter() - begin - training.building_seconds) / seconds
        if training.steps - told >= 500:
            told = training.steps
            said = f"{kind} d {d_model} n {d_state} rate {rate:.1e}: step {told}, "
            said += f"{pairs_at(progress, options.length)} pairs, loss {training.loss.item():.3f}"
            print(said, file=sys.stderr, flush=True)
    row = {
        "mixer": kind, "d_model": d_model, "d_state": d_state, "rate": rate,
        "length": options.length, "pairs": options.length // 4, "vocab": options.vocab,
        "batch": options.batch, "steps": training.steps, "accuracy": accuracy(model, options),
        "seconds": round(time.perf_counter() - begin, 1), "device": options.device,
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row


class Training:
    """The steps of one model, and what they need to be a CUDA graph: tensors that stay in place."""

    def __init__(self, model, rate, options, random):
        self.model, self.highest, self.options, self.random = model, rate, options, random
        self.cuda = torch.device(options.device).type == "cuda"
        self.rate = torch.tensor(rate, device=options.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, options.weight_decay),
            lr=self.rate if self.cuda else rate, fused=self.cuda, capturable=self.cuda,
        )  # fmt: skip
        self.loss = torch.zeros((), device=options.device)
        self.graphs = {}  # by number of pairs
        self.steps, self.building_seconds = 0, 0.0

    def step(self, progress):
        """One step, progress (0 .. 1) of the way through the training."""
        rate = self.highest * min(1, (progress + 1e-3) / WARM_UP, (1 - progress) / (1 - WARM_UP))
        pairs = pairs_at(progress, self.options.length)
        self.steps += 1
        if not self.cuda:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.run(pairs)
            return
        self.rate.fill_(rate)
        if pairs not in self.graphs:
            torch.cuda.synchronize()
            self.graphs.clear()  # a stage that is over; a graph holds its own memory
            self.graphs[pairs] = self.capture(pairs)
        self.graphs[pairs].replay()

    def run(self, pairs):
        self.optimizer.zero_grad(set_to_none=True)
        logits, answers = answer(self.model, pairs, self.options, self.random)
        loss = F.cross_entropy(logits.float().flatten(0, 1), answers.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def capture(self, pairs):
        """The graph of one step with so many pairs; its first steps are run here."""
        begin = time.perf_counter()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self.run(pairs)
        self.steps += WARM_UP_STEPS
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.random)
        with torch.cuda.graph(graph):
            self.run(pairs)
        torch.cuda.synchronize()
        self.building_seconds += time.perf_counter() - begin
        return graph


def answer(model, pairs, options, random):
    """The model's logits at the queries of new sequences, and the right answers."""
    tokens, queries, answers = draw(
        options.batch, options.length, pairs, options.vocab, random, options.device
    )
    half = torch.device(options.device).type == "cuda"
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        return model(tokens, queries), answers


@torch.no_grad()
def accuracy(model, options, batches=8):
    """The share of right answers with a quarter as many pairs as tokens, on unseen sequences."""
    model.eval()
    random, right = torch.Generator(options.device).manual_seed(options.seed + 1), 0.0
    for _ in range(batches):
        logits, answers = answer(model, options.length // 4, options, random)
        right += (logits.argmax(-1) == answers).float().mean().item()
    return right / batches
