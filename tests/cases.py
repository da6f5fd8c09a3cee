"""Problems to test: what a case is, a pairwise cover of all arguments, and inputs for one."""

import itertools
import math
import random
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Case:
    """One problem. Sizes are the paper's; what is absent is None or False."""

    b: int = 2
    l: int = 65
    h: int = 6
    p: int = 16
    g: int = 2
    n: int = 16
    dtype: torch.dtype = torch.float32
    dt_dtype: torch.dtype | None = None  # None: dtype
    D: str | None = None  # "h" or "hp"
    z: bool = False
    dt_bias: bool = False
    dt_softplus: bool = True
    dt_limit: tuple = (0.0, math.inf)
    initial_states: str | None = None  # "working": fp32 or fp64; "x": dtype
    cu_seqlens: tuple | None = None
    cu_dtype: torch.dtype = torch.int32
    seq_idx: bool = False
    d_final_states: bool = True
    save_states: bool = False
    sliced: bool = False  # inputs are slices of one projection with NaN between them
    decay: str = "usual"  # of a token: "weak" 1e-4, "usual" about 0.3, "strong" about 5; "steep":
    # heads that forget at once beside heads that never do, tokens of delta 0 and 100
    seed: int = 0

    @property
    def sequences(self):
        return self.b if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def working(self):
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def __str__(self):
        shown = {k: v for k, v in vars(self).items() if v != getattr(Case, k)}
        return " ".join(f"{k}={v}" for k, v in shown.items()).replace("torch.", "") or "default"


# delta is about 0.1 with these; |A| times it is the decay of a token, in natural logarithm.
MEAN_DELTA = 0.1
MEAN_DECAY = {"weak": 1e-4, "usual": 0.3, "strong": 5.0, "steep": 1.0}


def make_inputs(case, device="cpu"):
    """The arguments of ssd_scan by name, for mamba2_cuda.ssd_scan(**inputs)."""
    c, random_ = case, torch.Generator().manual_seed(case.seed)

    def normal(*shape, dtype=c.dtype, scale=1.0, mean=0.0):
        v = torch.randn(*shape, dtype=torch.float64, generator=random_)
        return (mean + scale * v).to(dtype)

    raw = math.log(math.expm1(MEAN_DELTA)) if c.dt_softplus else MEAN_DELTA
    spread = 0.5 if c.dt_softplus else 0.4 * MEAN_DELTA
    inputs = {
        "x": normal(c.b, c.l, c.h, c.p),
        "dt": normal(c.b, c.l, c.h, dtype=c.dt_dtype or c.dtype, scale=spread, mean=raw),
        "A": -MEAN_DECAY[c.decay] / MEAN_DELTA * normal(c.h, dtype=c.working, scale=0.3).exp(),
        "B": normal(c.b, c.l, c.g, c.n),
        "C": normal(c.b, c.l, c.g, c.n),
    }
    if c.D:
        inputs["D"] = normal(*((c.h,) if c.D == "h" else (c.h, c.p)), dtype=c.working)
    if c.z:
        inputs["z"] = normal(c.b, c.l, c.h, c.p)
    if c.dt_bias:
        inputs["dt_bias"] = normal(c.h, dtype=c.working, scale=0.3 * spread)
    if c.initial_states:
        dtype = c.dtype if c.initial_states == "x" else c.working
        inputs["initial_states"] = normal(c.sequences, c.h, c.p, c.n, dtype=dtype)
    if c.decay == "steep":
        steepen(inputs)
    if c.sliced:
        inputs |= slices_of_a_projection(inputs)
    if c.cu_seqlens is not None:
        inputs["cu_seqlens"] = torch.tensor(c.cu_seqlens, dtype=c.cu_dtype)
    if c.seq_idx:
        changes = torch.rand(c.b, c.l, generator=random_) < 0.1
        inputs["seq_idx"] = changes.cumsum(1).int()
    inputs = {k: v.to(device) for k, v in inputs.items()}
    return inputs | {"dt_softplus": c.dt_softplus, "dt_limit": c.dt_limit}


def make_gradients(case, device="cpu"):
    """dy, and d_final_states or None."""
    random_ = torch.Generator().manual_seed(case.seed + 1)
    c = case
    dy = torch.randn(c.b, c.l, c.h, c.p, dtype=torch.float64, generator=random_).to(c.dtype)
    states = (c.sequences, c.h, c.p, c.n)
    d_final = torch.randn(*states, dtype=torch.float64, generator=random_).to(c.working)
    return dy.to(device), d_final.to(device) if c.d_final_states else None


# ---- extreme steps and decays (delta = 0: nothing enters; A = -1e4: nothing is left)

# dt in fp32, for d_dt is of the size of A, which fp16 does not hold.
STEEP = Case(h=6, n=32, p=32, dt_dtype=torch.float32, initial_states="working")


def extreme_steps(A, delta, mixed, dtype, device="cpu", **sizes):
    """Inputs, dy and d_final_states: every token with this delta, or every second one."""
    case = replace(STEEP, l=150, dtype=dtype, dt_softplus=False, **sizes)
    inputs, (dy, d_final) = make_inputs(case, device), make_gradients(case, device)
    inputs["dt"][:, :: 2 if mixed else 1] = delta
    inputs["A"][:] = A
    return inputs, dy, d_final


def steep_and_flat_heads(dtype, device="cpu", **sizes):
    """Inputs, dy and d_final_states: one head forgets at once and one never."""
    case = replace(STEEP, l=300, dtype=dtype, dt_bias=True, decay="steep", **sizes)
    return make_inputs(case, device), *make_gradients(case, device)


def steepen(inputs):
    rates = torch.tensor([0.0, -1e-6, -1.0, -100.0, -1e4, -1e-3], dtype=inputs["A"].dtype)
    inputs["A"][:] = rates.repeat(1 + len(inputs["A"]) // len(rates))[: len(inputs["A"])]
    inputs["dt"][:, ::7] = 100.0
    inputs["dt"][:, 3::7] = -100.0  # softplus gives 0


def still_states(dtype, device="cpu"):
    """Inputs, dy and d_final_states: states that stay what they were over 1024 tokens."""
    case = replace(STEEP, b=1, l=1024, h=24, n=16, p=16, dtype=dtype, dt_softplus=False)
    inputs, (dy, d_final) = make_inputs(case, device), make_gradients(case, device)
    inputs["dt"][:] = 1e-4
    inputs["A"][:] = 0.0
    return inputs, dy, d_final


def slices_of_a_projection(inputs):
    """z, x, B, C and dt as slices of one (b, l, width) tensor, NaN in all that is not theirs.

    Slices begin at multiples of 16 bytes, as a projection of a model gives them.
    """
    x = inputs["x"]
    b, l = x.shape[:2]
    names = [k for k in ("z", "x", "B", "C", "dt") if k in inputs and inputs[k].dtype == x.dtype]
    unit = max(1, 16 // x.element_size())
    begins, width = {}, unit
    for name in names:
        begins[name] = width
        channels = inputs[name][0, 0].numel() if l else math.prod(inputs[name].shape[2:])
        width += -(-channels // unit) * unit + unit
    projection = torch.full((b, l, width), math.nan, dtype=x.dtype)
    sliced = {}
    for name in names:
        v = inputs[name]
        channels = math.prod(v.shape[2:])
        columns = projection[:, :, begins[name] : begins[name] + channels]
        sliced[name] = columns.unflatten(2, v.shape[2:]) if v.dim() == 4 else columns
        sliced[name].copy_(v)
    return sliced


FACTORS = {
    "p": (5, 16, 19, 32, 64, 80, 128),
    "n": (2, 16, 19, 64, 96, 128, 256),
    "l": (0, 1, 7, 63, 64, 65, 2049),
    "h": (3, 6),
    "g": (1, 2, "h"),
    "dtype": (torch.bfloat16, torch.float32, torch.float16, torch.float64),
    "dt_dtype": (None, torch.float32),
    "D": (None, "h", "hp"),
    "z": (False, True),
    "dt_bias": (False, True),
    "dt_softplus": (False, True),
    "dt_limit": ((0.0, math.inf), (0.07, 0.16)),
    "initial_states": (None, "working", "x"),
    "sequences": ("rows", "seq_idx", "packed"),
    "d_final_states": (False, True),
    "save_states": (False, True),
    "sliced": (False, True),
    "decay": ("weak", "usual", "strong"),
}


def pairwise(factors=FACTORS, seed=0, candidates=40):
    """Rows in which every two values of every two factors meet, unless they exclude each other.

    Greedy: each row starts from a pair not yet met and is the best of a few random completions.
    """
    random_ = random.Random(seed)

    def allowed(row):
        return not (row["g"] == 2 and row["h"] % 2)

    def pairs_of(row):
        return set(itertools.combinations(row.items(), 2))

    missing = {
        ((k1, v1), (k2, v2))
        for k1, k2 in itertools.combinations(factors, 2)
        for v1, v2 in itertools.product(factors[k1], factors[k2])
        if not ({k1: v1, k2: v2}.get("g") == 2 and {k1: v1, k2: v2}.get("h") == 3)
    }
    order = sorted(missing, key=repr)
    while order:
        fixed = dict(order[0])
        rows = []
        while len(rows) < candidates:
            row = {k: fixed.get(k, random_.choice(v)) for k, v in factors.items()}
            if allowed(row):
                rows.append(row)
        best = max(rows, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        order = [pair for pair in order if pair in missing]
        yield best


def case_of(row, seed=0):
    """The Case of a row of `pairwise`."""
    row = dict(row)
    sequences = row.pop("sequences")
    row["g"] = row["h"] if row["g"] == "h" else row["g"]
    case = Case(**row, seed=seed, b=2 if row["l"] < 2049 else 1, seq_idx=sequences == "seq_idx")
    return packed(case, random.Random(seed)) if sequences == "packed" else case


def packed(case, random_, sequences=5):
    """The case as one row of sequences, some empty, some tokens before and after all of them."""
    inner = sorted(random_.randint(0, case.l) for _ in range(sequences))
    cu = (*inner[:3], inner[2], *inner[3:])
    cu_dtype = random_.choice((torch.int32, torch.int64))
    return replace(case, b=1, cu_seqlens=cu, cu_dtype=cu_dtype)
