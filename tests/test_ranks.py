"""A mixer shared by ranks is the mixer of one rank: result, every gradient, and steps."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mamba2_cuda.nn import Mamba2
from mamba2_cuda.nn.ranks import share_of_state

RANKS = 2
CASES = {
    "norm": {},
    "no norm": dict(rmsnorm=False),
    "norm groups": dict(norm_groups=2, norm_before_gate=True),
    "biases, D a channel": dict(bias=True, D_has_hdim=True),
    "no bias of the convolution": dict(conv_bias=False),
}


def make(group=None, **options):
    torch.manual_seed(0)
    return Mamba2(
        32, d_state=8, headdim=8, ngroups=4, dtype=torch.float64, process_group=group, **options
    )


def results(mixer, u):
    """The result, u's gradient and the parameters', as a state dict; and the result by steps."""
    u = u.clone().requires_grad_()
    y = mixer(u)
    names, parameters = zip(*mixer.named_parameters())
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    du, *gradients = torch.autograd.grad(y, [u, *parameters], dy)
    with torch.no_grad():
        cache = mixer.allocate_cache(len(u))
        pieces = [mixer(part, cache=cache) for part in u.split([4, 1, 1, 1], 1)]
    return y, du, torch.cat(pieces, 1), dict(zip(names, gradients))


def as_one_of_two(rank, meeting):
    """Run by each rank; an assertion that fails ends both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    u = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, options in CASES.items():
        whole, shared = make(**options), make(dist.group.WORLD, **options)
        with torch.no_grad():  # a bias and weights that matter
            for parameter in whole.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        shared.load_share(whole.state_dict())
        y, du, stepped, gradients = results(whole, u)
        expected = (y, du, stepped, share_of_state(gradients, whole.layout, rank, RANKS))
        torch.testing.assert_close(results(shared, u), expected, msg=lambda m, n=name: f"{n}: {m}")
        assert sum(p.numel() for p in shared.parameters()) < 0.6 * sum(
            p.numel() for p in whole.parameters()
        )
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_are_one(tmp_path):
    mp.spawn(as_one_of_two, (tmp_path / "meeting",), nprocs=RANKS)


def test_what_ranks_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: group)
    with pytest.raises(ValueError, match=r"ngroups \(4\) must be multiples"):
        make(3, norm_groups=3)
    with pytest.raises(ValueError, match=r"norm_groups \(1\) % number of ranks \(2\)"):
        make(2, norm_groups=1)
