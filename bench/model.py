"""Times a mixer, a training step and generation on one GPU, beside mamba_ssm.

    python -m bench.model                              all three, both implementations
    python -m bench.model --what mixer --impls mamba2_cuda

mixer     in_proj to out_proj of the 2.7B shape, b8 x 4096, bf16: forward, forward and backward, and
          the host's time of an eager forward
step      the 130M model, b8 x 2048, fp32 weights, bf16 autocast, clipping, fused AdamW
generate  the 130M model in bf16, 100 tokens of prompt and 256 new ones, the most likely each, whole
          tokens as CUDA graphs; with a state of fp32 and, as mamba_ssm has it, of bf16

Ours comes first. mamba_ssm tunes its kernels on first use, for a minute or so. What fails is
reported and the rest goes on; after --seconds nothing new is begun.
Refuses when the tests of these sources were not green on this machine's GPU, as bench.run.
"""

import gc
import statistics
import time
import traceback

import torch

from bench import command, rows, timing
from bench.model_rivals import MAKERS
from mamba2_cuda.training import Recipe
from mamba2_cuda.training.recipe import make_optimizer

OURS, RIVAL = "mamba2_cuda", "mamba_ssm"
PROMPT, NEW = 100, 256
BATCH, LENGTH = 8, 2048  # of the training step


def main():
    options = parse_options()
    common = {"dtype": "bf16", **command.begin("model", options)}
    begin = time.perf_counter()
    measured = []
    for name in options.impls:
        maker = attempt(name, lambda name=name: MAKERS[name](options.mamba_ssm))
        for what in options.what if maker else ():
            if time.perf_counter() - begin > options.seconds:
                print(f"no time for {what} of {name}", flush=True)
                continue
            of_impl = {"impl": name, "version": maker.version, **common}
            for row in attempt(f"{what} of {name}", lambda w=what, m=maker: measure(w, m)) or ():
                measured.append({**row, **of_impl})
                print({k: v for k, v in row.items()}, name, flush=True)
            if not options.unchecked:  # after each: a run may be cut short
                rows.add(options.results / "h200_model.json", with_ratios(measured))
    print(table(with_ratios(measured)))


def parse_options():
    parser = command.parser("model", __doc__, "h200_model.json")
    command.add_mamba_ssm(parser)
    add = parser.add_argument
    add("--what", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    add("--impls", nargs="+", choices=MAKERS, default=list(MAKERS))
    add("--seconds", type=float, default=600, help="after which nothing new is begun (600)")
    return parser.parse_args()


def attempt(what, call):
    """call(), or None and a report when it fails: one of many shall not end all."""
    try:
        return call()
    except Exception as failure:
        traceback.print_exc(limit=3)
        print(f"{what} failed: {str(failure)[:300]}", flush=True)
        torch.cuda.empty_cache()
        return None


def measure(what, maker):
    torch.manual_seed(0)
    gc.collect()
    torch.cuda.empty_cache()
    return list(MEASUREMENTS[what](maker))


def mixer(maker):
    layer = maker.mixer()
    u = torch.randn(8, 4096, 2560, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy, leaves = torch.randn_like(u), [u, *layer.parameters()]

    @torch.no_grad()
    def forward():
        layer(u)

    def train():
        torch.autograd.grad(layer(u), leaves, dy)

    for call, op in ((forward, "mixer_fwd"), (train, "mixer_train")):
        call()  # kernels are tuned here
        yield row(op, "2.7b_b8_l4k", timing.median_ms(call))
    short = torch.randn(1, 64, 2560, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        yield row("mixer_fwd_host", "2.7b_b1_l64", host_ms(lambda: layer(short)))


def host_ms(call, rounds=10, count=100):
    """What one call keeps the host busy for: the work it queues is too small to fill the queue.

    The least of the rounds' medians: others on the same host make a whole round slower.
    """
    for _ in range(10):
        call()
    medians = []
    for _ in range(rounds):
        times = []
        for _ in range(count):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            times.append((time.perf_counter() - begin) * 1e3)
        medians.append(statistics.median(times))
    return min(medians)


def step(maker, warm=3, count=10):
    before = torch.cuda.memory_allocated()
    model = maker.model().train()
    recipe = Recipe(steps=1000, batch=BATCH, length=LENGTH)
    optimizer = make_optimizer(model, recipe)
    tokens = torch.randint(50277, (BATCH, LENGTH + 1), device="cuda")

    def one():
        with torch.autocast("cuda", torch.bfloat16):
            loss = maker.loss(model, tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    seconds = []
    for i in range(warm + count):
        if i == warm:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        one().item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[warm:])
    yield {
        **row("train_step", "130m_b8_l2k", median * 1e3),
        "tokens_per_s": round(BATCH * LENGTH / median),
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
    }


def generate(maker, count=3):
    model = maker.model(torch.bfloat16).eval()
    dtypes = {"fp32": None, "bf16": torch.bfloat16} if maker.name == OURS else {"bf16": None}
    for batch in (1, 64):
        prompts = torch.randint(50277, (batch, PROMPT))
        for name, dtype in dtypes.items():
            call = maker.generate(model, prompts, NEW, dtype)
            seconds = []
            for _ in range(1 + count):
                begin = time.perf_counter()
                tokens = call()  # on the host: nothing is left to wait for
                seconds.append(time.perf_counter() - begin)
            assert [len(text) for text in tokens] == [NEW] * batch
            median = statistics.median(seconds[1:])
            shape = f"130m_b{batch}_100+256_{name}_state"
            yield {
                **row("generate", shape, median * 1e3, graph=True),
                "tokens_per_s": round(batch * NEW / median),
            }


def row(op, shape, ms, graph=False):
    return {"op": op, "shape": shape, "ms": round(ms, 5), "graph": graph}


def with_ratios(measured):
    """Adds to our rows how many times as long mamba_ssm takes for the same."""
    theirs = {(r["op"], r["shape"]): r["ms"] for r in measured if r["impl"] == RIVAL}
    for r in measured:
        at = r["op"], r["shape"].replace("fp32_state", "bf16_state")
        if r["impl"] == OURS and at in theirs:
            r["ratio"] = round(theirs[at] / r["ms"], 3)
            r["ratios"] = {RIVAL: r["ratio"]}
    return measured


def table(measured):
    """The rows as text, one line each."""
    lines = [f"{'op':14} {'shape':28} {'impl':12} {'ms':>9} {'tokens/s':>9} {'GB':>6} {'ratio':>6}"]
    for r in measured:
        tokens, peak = r.get("tokens_per_s", ""), r.get("peak_bytes")
        lines.append(
            f"{r['op']:14} {r['shape']:28} {r['impl']:12} {r['ms']:9.3f} {tokens:>9} "
            f"{f'{peak / 1e9:.2f}' if peak else '':>6} {rows.cell(r, 'ratio', 6)}"
        )
    return "\n".join(lines)


MEASUREMENTS = {"mixer": mixer, "step": step, "generate": generate}

if __name__ == "__main__":
    main()
