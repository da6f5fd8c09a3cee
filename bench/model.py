"""Times the model around the scan on one GPU: a mixer, a training step, generation.

    python -m bench.model                    all three
    python -m bench.model --what mixer

mixer     in_proj to out_proj of the 2.7B shape, b8 x 4096, bf16: forward, forward and backward, and
          the host's time of an eager forward
step      the 130M model, b8 x 2048, fp32 weights, bf16 autocast, fused AdamW
generate  the 130M model in bf16, 100 tokens of prompt and 256 new ones, whole tokens as CUDA graphs

Refuses when the tests of these sources were not green on this machine's GPU, as bench.run.
"""

import argparse
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from bench import rows, stamp, timing
from mamba2_cuda import __version__
from mamba2_cuda.model import Decoder, Mamba2LMHeadModel, ModelConfig, Sampling
from mamba2_cuda.nn import Mamba2
from mamba2_cuda.training import Recipe, Trainer, Windows

SMALL = ModelConfig(d_model=768, n_layer=24, vocab_size=50277, pad_vocab_size_multiple=16)
PROMPT, NEW = 100, 256


def main():
    options = parse_options()
    if not torch.cuda.is_available():
        raise SystemExit("bench.model measures on a GPU")
    stamp.refuse_if_red(options.unchecked)
    command = shlex.join(["python", "-m", "bench.model", *sys.argv[1:]])
    common = {"dtype": "bf16", "impl": "mamba2_cuda", "version": __version__}
    common |= {"gpu": torch.cuda.get_device_name(), **rows.provenance(command, options.commit)}
    for what in options.what:
        measured = [{**row, **common} for row in MEASUREMENTS[what]()]
        for row in measured:
            print({k: v for k, v in row.items() if k not in common}, flush=True)
        if not options.unchecked:
            rows.add(options.results / "h200_model.json", measured)


def parse_options():
    parser = argparse.ArgumentParser(
        prog="python -m bench.model", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    out = os.environ.get("OUT", stamp.ROOT / "bench/results")
    parser.add_argument("--what", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--results", type=Path, default=Path(out), help="folder (or $OUT)")
    parser.add_argument("--commit", default=None, help="what is measured, where git does not say")
    parser.add_argument(
        "--unchecked", action="store_true", help="without green tests; saves nothing"
    )
    return parser.parse_args()


def mixer():
    torch.manual_seed(0)
    layer = Mamba2(2560, device="cuda", dtype=torch.bfloat16)
    u = torch.randn(8, 4096, 2560, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(u)
    leaves = [u, *layer.parameters()]

    @torch.no_grad()
    def forward():
        layer(u)

    def train():
        torch.autograd.grad(layer(u), leaves, dy)

    for call, op in ((forward, "mixer_fwd"), (train, "mixer_train")):
        yield row(op, "2.7b_b8_l4k", timing.median_ms(call))
    short = u[:1, :64].detach()

    @torch.no_grad()
    def host():
        layer(short)

    yield row("mixer_fwd_host", "2.7b_b1_l64", host_ms(host))


def host_ms(call, count=200):
    """What one call keeps the host busy for: the work it queues is too small to fill the queue."""
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def step():
    torch.manual_seed(0)
    model = Mamba2LMHeadModel(SMALL, device="cuda")
    recipe = Recipe(steps=1000, batch=8, length=2048)
    windows = Windows(torch.randint(50277, (1_000_000,)), recipe.length)
    trainer = Trainer(model, recipe, windows, windows, "out/bench_model")
    for _ in range(5):
        trainer.train_step()
    torch.cuda.reset_peak_memory_stats()
    lines = [trainer.train_step() for _ in range(20)]
    seconds = statistics.median(line["seconds_per_step"] for line in lines)
    yield {
        **row("train_step", "130m_b8_l2k", seconds * 1e3),
        "tokens_per_s": round(recipe.batch * recipe.length / seconds),
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def generate():
    torch.manual_seed(0)
    model = Mamba2LMHeadModel(SMALL, device="cuda", dtype=torch.bfloat16).eval()
    for batch in (1, 64):
        decoder = Decoder(model, batch, PROMPT + NEW, sampling=Sampling(temperature=0))
        prompts = torch.randint(50277, (batch, PROMPT)).tolist()
        decoder.generate(prompts, NEW)
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            decoder.generate(prompts, NEW)  # its last tokens are on the host when it returns
            seconds.append(time.perf_counter() - begin)
        median = statistics.median(seconds)
        yield {
            **row("generate", f"130m_b{batch}_100+256", median * 1e3, graph=True),
            "tokens_per_s": round(batch * NEW / median),
        }


def row(op, shape, ms, graph=False):
    return {"op": op, "shape": shape, "ms": round(ms, 5), "graph": graph}


MEASUREMENTS = {"mixer": mixer, "step": step, "generate": generate}

if __name__ == "__main__":
    main()
