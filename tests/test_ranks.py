"""What ranks share is what one rank has: a mixer's result, gradients and steps; a sequence's scan.

Ranks are processes on the CPU, by gloo, or GPUs, by nccl.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import Case, make_gradients, make_inputs
from common import confidence, gradients, leaves_of, run_public, truth_of

from mamba2_cuda import ssd_scan
from mamba2_cuda.nn import Mamba2
from mamba2_cuda.nn.ranks import scan_shared_sequence, share_of_state

RANKS = 2
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def as_one_of_them(rank, ranks, device, meeting, task):
    """Run by each rank; an assertion that fails ends all."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    method = f"file://{meeting}"
    dist.init_process_group(BACKENDS[device], init_method=method, rank=rank, world_size=ranks)
    task(rank, device)
    dist.destroy_process_group()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def ranks(request, tmp_path):
    """A function that runs a task(rank, device) on each of so many ranks, or of all GPUs if they
    are fewer, but at least two."""
    device = request.param
    if device == "cuda" and torch.cuda.device_count() < RANKS:
        pytest.skip("fewer than two CUDA devices on this machine")
    if not dist.is_backend_available(BACKENDS[device]):
        pytest.skip(f"this torch has no {BACKENDS[device]}")

    def run(task, count):
        count = count if device == "cpu" else min(count, torch.cuda.device_count())
        mp.spawn(as_one_of_them, (count, device, tmp_path / "meeting", task), nprocs=count)

    return run


# ---- a mixer

MIXERS = {
    "norm": {},
    "no norm": dict(rmsnorm=False),
    "norm groups": dict(norm_groups=2, norm_before_gate=True),
    "biases, D a channel": dict(bias=True, D_has_hdim=True),
    "no bias of the convolution": dict(conv_bias=False),
}


def make(group=None, device="cpu", **options):
    torch.manual_seed(0)
    return Mamba2(
        32, d_state=8, headdim=8, ngroups=4, dtype=torch.float64, process_group=group, **options
    ).to(device)


def normal(*shape, seed, device):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=random, dtype=torch.float64).to(device)


def results(mixer, u):
    """The result, u's gradient and the parameters', as a state dict; and the result by steps."""
    u = u.clone().requires_grad_()
    y = mixer(u)
    names, parameters = zip(*mixer.named_parameters())
    dy = normal(*y.shape, seed=2, device=y.device)
    du, *gradients = torch.autograd.grad(y, [u, *parameters], dy)
    with torch.no_grad():
        cache = mixer.allocate_cache(len(u))
        pieces = [mixer(part, cache=cache) for part in u.split([4, 1, 1, 1], 1)]
    return y, du, torch.cat(pieces, 1), dict(zip(names, gradients))


def share_mixers(rank, device):
    u = normal(2, 7, 32, seed=1, device=device)
    for name, options in MIXERS.items():
        whole, shared = (make(group, device, **options) for group in (None, dist.group.WORLD))
        with torch.no_grad():  # a bias and weights that matter
            for parameter in whole.parameters():
                parameter += 0.2 * normal(*parameter.shape, seed=3, device=device)
        shared.load_share(whole.state_dict())
        y, du, stepped, gradients = results(whole, u)
        expected = (y, du, stepped, share_of_state(gradients, whole.layout, rank, RANKS))
        torch.testing.assert_close(results(shared, u), expected, msg=lambda m, n=name: f"{n}: {m}")
        assert sum(p.numel() for p in shared.parameters()) < 0.6 * sum(
            p.numel() for p in whole.parameters()
        )


def test_a_shared_mixer_is_a_whole_one(ranks):
    ranks(share_mixers, RANKS)


def test_what_ranks_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: group)
    with pytest.raises(ValueError, match=r"ngroups \(4\) must be multiples"):
        make(3, norm_groups=3)
    with pytest.raises(ValueError, match=r"norm_groups \(1\) % number of ranks \(2\)"):
        make(2, norm_groups=1)


# ---- a sequence

SEQUENCE = Case(l=260, h=12, g=1, dt_dtype=torch.float32, D="h", z=True, dt_bias=True,
                d_final_states=False, decay="weak")  # fmt: skip
SEQUENCES = {
    "fp64": replace(SEQUENCE, dtype=torch.float64, dt_dtype=torch.float64, p=5, n=19, D="hp"),
    "bf16": replace(SEQUENCE, dtype=torch.bfloat16, p=64, n=128),
    "fp16": replace(SEQUENCE, dtype=torch.float16, p=64, n=64, decay="usual"),
}
OF_TOKENS = ("x", "dt", "B", "C", "z")  # the others belong to all ranks
# Root mean square of a rounding, relative: uniform in half a unit of the last place.
ROUNDING = {torch.bfloat16: 2**-9 / 3**0.5, torch.float16: 2**-12 / 3**0.5}


def share_sequences(rank, device):
    for name, case in SEQUENCES.items():
        if device == "cuda":
            case = replace(case, l=4100)  # segments of the kernels' own
        share_sequence(rank, case, device, name)


def share_sequence(rank, case, device, name):
    """A rank rounds gradients twice where the whole scan does once: each operator its own. And both
    draw their rounding errors anew, which for a value a head is far apart (`confidence`)."""
    inputs, (dy, _) = make_inputs(case, device), make_gradients(case, device)
    ranks = dist.get_world_size()
    ends = [case.l * i // ranks + 7 * (0 < i < ranks) for i in range(ranks + 1)]
    tokens = slice(ends[rank], ends[rank + 1])
    mine = {k: v[:, tokens] if k in OF_TOKENS else v for k, v in inputs.items()}
    leaves = leaves_of(mine)
    y = scan_shared_sequence(**{**mine, **leaves}, group=dist.group.WORLD)
    got = {"y": y.detach()} | gradients(leaves, y, None, dy[:, tokens], None)
    whole = run_public(ssd_scan)(inputs, dy, None)
    true = truth_of(inputs, dy, None)
    for key, v in got.items():
        parts = (v, whole[key], true[key])
        if key in ("dA", "dD", "d_dt_bias"):
            dist.all_reduce(v)
        else:
            parts = (v, whole[key][:, tokens], true[key][:, tokens])
        shared, alone = ((part.double() - parts[2]).norm() for part in parts[:2])
        once = ROUNDING.get(v.dtype, 2**-24 if v.dtype == torch.float32 else 2**-53)
        allowed = 1.2 * torch.hypot(alone, 2 * once * parts[2].norm())
        allowed *= confidence(key, parts[1].double() - parts[2])
        if case.dtype == torch.float64:
            allowed = 1e-12 * parts[2].norm()
        assert shared <= allowed, f"{name} {key}: {shared:.3g}, allowed {allowed:.3g}"


def test_a_shared_sequence_is_a_whole_one(ranks):
    ranks(share_sequences, 3)  # from the third on, a decay's gradient goes through another rank
