"""CUDA graphs replayed at once, each on a stream of its own: none waits for ever, none changes.

What could hang is a block that waits for another one which finds no room on the card: tasks of the
scan's forward that follow one another, and kernels launched while the one in front still runs, of
which the scan's backward waits for counts. docs/kernels.md says why they cannot. The runs are
another process's, which is ended when one of them takes SECONDS; the next run then has a new one.
A process of its own for each would take longer to start than all runs together take.

    PYTHONPATH=.:tests python tests/test_streams.py mixed tickets      runs, as the test has them
"""

import sys

import pytest
import torch
from worker import Worker

pytestmark = pytest.mark.gpu
STREAMS, REPLAYS, SECONDS = 9, 200, 120
SM80, SM90, TICKETS, SEGMENTS = 2, 3, 1 << 4, 2 << 4  # csrc/ssd/plan.h


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def scan(plan, b=2, l=4096, h=24, p=64, n=128, z=False, lengths=None):
    """A training step of the scan alone."""
    from mamba2_cuda import ssd_scan
    from mamba2_cuda.ops.plan import force_plan

    leaves = [normal(b, l, h, p), normal(b, l, h), normal(b, l, 1, n), normal(b, l, 1, n)]
    leaves += [normal(b, l, h, p)] * z
    x, dt, B, C, *rest = (leaf.requires_grad_() for leaf in leaves)
    A, D, dy = -torch.rand(h, device="cuda") - 0.1, normal(h), normal(b, l, h, p)
    options = {"z": rest[0]} if z else {}
    if lengths:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        options["cu_seqlens"] = ends.int().cuda()

    def call():
        with force_plan(plan):
            y = ssd_scan(x, dt, A, B, C, D=D, dt_softplus=True, **options)
        return y, *torch.autograd.grad(y, leaves, dy)

    return call


def blocks():
    """A training step of two layers, whose products are a library's."""
    from mamba2_cuda.nn import Block, Mamba2

    layers = torch.nn.ModuleList(Block(128, Mamba2(128, d_state=64)) for _ in range(2)).cuda()
    u = normal(64, 256, 128, dtype=torch.float32)

    def call():
        with torch.autocast("cuda", torch.bfloat16):
            v = layers[1](layers[0](u))
        return v, *torch.autograd.grad(v.square().mean(), list(layers.parameters()))

    return call


def decode(batch, tokens=4):
    """Steps of two layers from a state that every replay puts back."""
    from mamba2_cuda.nn import Block, Mamba2, Tokens

    made = dict(device="cuda", dtype=torch.bfloat16)
    layers = [Block(512, Mamba2(512, **made), **made) for _ in range(2)]
    caches = [layer.mixer.allocate_cache(batch) for layer in layers]
    first = [normal(*cache.ssm.shape, dtype=torch.float32) for cache in caches]
    u = normal(batch, 1, 512, dtype=torch.float32)

    @torch.no_grad()
    def call():
        for cache, state in zip(caches, first):
            cache.ssm.copy_(state)
            cache.conv.zero_()
        residual = u
        for _ in range(tokens):
            for layer, cache in zip(layers, caches):
                residual = layer(residual, Tokens(1), cache)
        return residual, *(cache.ssm for cache in caches)

    return call


PROBLEMS = {
    "tickets": lambda: scan(SM90 | TICKETS),
    "segments": lambda: scan(SM90 | SEGMENTS, b=1, l=8192, h=8, n=64),
    "wide": lambda: scan(SM90 | TICKETS, l=2048, h=8, n=256, z=True),
    "packed": lambda: scan(SM90 | TICKETS, b=1, h=16, lengths=(0, 1500, 3, 0, 2000, 500)),
    "padded": lambda: scan(SM90 | SEGMENTS, b=1, h=8, p=80, lengths=(1000, 0, 3000)),
    "portable": lambda: scan(SM80, b=1, h=8),
    "one row": lambda: decode(1),
    "rows": lambda: decode(64),
    "blocks": blocks,
}


class Run:
    """A problem's graph, the stream it is replayed on, and what it gives alone."""

    def __init__(self, make):
        self.call, self.stream = make(), torch.cuda.Stream()  # call holds what the graph reads
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                self.call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # Its own stream: a library's scratch memory belongs to the stream of the capture.
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.results = self.call()
        self.replay()
        torch.cuda.synchronize()
        self.expected = [result.clone() for result in self.results]

    def replay(self):
        with torch.cuda.stream(self.stream):
            self.graph.replay()

    def same(self):
        return all(torch.equal(got, alone) for got, alone in zip(self.results, self.expected))


def replay_at_once(kinds):
    torch.manual_seed(0)
    runs = [Run(PROBLEMS[kind]) for kind in kinds]
    torch.cuda.synchronize()
    for _ in range(REPLAYS):
        for run in runs:
            run.replay()
    torch.cuda.synchronize()
    changed = [kind for kind, run in zip(kinds, runs) if not run.same()]
    assert not changed, f"other bits than alone: {changed}"


@pytest.fixture(scope="module")
def worker():
    made = Worker(__file__, seconds=SECONDS)
    yield made
    made.end()


@pytest.mark.parametrize("kind", ["mixed", *PROBLEMS])
def test_graphs_on_streams(kind, cuda, worker):
    if torch.cuda.get_device_capability() != (9, 0) and kind in ("mixed", *list(PROBLEMS)[:5]):
        pytest.skip("kernels of tier sm90")
    assert worker.ask(kind) == f"{kind}: same"


if __name__ == "__main__":
    for line in sys.argv[1:] or sys.stdin:
        kind = line.strip()
        replay_at_once(list(PROBLEMS) if kind == "mixed" else [kind] * STREAMS)
        print(f"{kind}: same", flush=True)
