"""What several ranks share: a mixer, whose heads and groups each have a rank, or a sequence, whose
segments do.

Mixer: u and the result are whole on every rank. A rank projects u to its own z, x, B, C, dt, and
its channels back to a summand of the result. So a layer has one all-reduce forward, of the result,
and one backward, of u's gradient. Source: paper, section 8.1.

Sequence: a segment is an affine map of the state (ssd_segment_state). The ranks exchange these
maps, and each scans its tokens from the state that enters them. Source: paper, section 8.2.
"""

import math

import torch
import torch.distributed as dist

from mamba2_cuda import ssd_scan, ssd_segment_state


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, group):
        ctx.group = group
        return u.view_as(u)

    @staticmethod
    def backward(ctx, du):
        du = du.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(du, group=ctx.group)
        return du, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, group):
        y = y.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy, None


def spread(u, group):
    """u, the same on every rank, as each rank's own input; its gradients are summed over ranks."""
    return _Spread.apply(u, group)


def total(y, group):
    """The sum of the ranks' y, on every rank."""
    return _Total.apply(y, group)


class _EnteringState(torch.autograd.Function):
    """The state that enters this rank's segment, from the segments' maps S -> exp(log_decay) S +
    state, in the order of the ranks, the first of which is entered by 0."""

    @staticmethod
    def forward(ctx, state, log_decay, group):
        ctx.group = group
        states, log_decays = gather(state, group), gather(log_decay, group)
        decays = [v.exp()[..., None, None] for v in log_decays]
        entering = [torch.zeros_like(state)]
        for r in range(dist.get_rank(group)):
            entering.append(decays[r] * entering[r] + states[r])
        ctx.save_for_backward(*entering, *decays)
        return entering[-1].clone()

    @staticmethod
    def backward(ctx, dS):
        ranks, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        entering, decays = ctx.saved_tensors[: rank + 1], ctx.saved_tensors[rank + 1 :]
        d_states = dS.new_zeros(ranks, *dS.shape)
        d_log_decays = dS.new_zeros(ranks, *dS.shape[:2])
        for r in reversed(range(rank)):
            d_states[r] = dS
            dS = decays[r] * dS
            d_log_decays[r] = (dS * entering[r]).sum((-2, -1))
        for d in (d_states, d_log_decays):
            dist.all_reduce(d, group=ctx.group)
        return d_states[rank], d_log_decays[rank], None


def gather(v, group):
    """Every rank's v, in their order."""
    everyone = [torch.empty_like(v) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, v.contiguous(), group=group)
    return everyone


def scan_shared_sequence(
    x, dt, A, B, C, *, group, D=None, z=None, dt_bias=None, dt_softplus=False,
    dt_limit=(0.0, math.inf),
):  # fmt: skip
    """ssd_scan of sequences whose tokens lie on the ranks of `group`, in their order.

    x, dt, B, C, z hold this rank's tokens, of which ranks may have different numbers, and so does
    the y returned. A, D, dt_bias are the same on all ranks; their gradients are this rank's
    summands. Shapes and dtypes are ssd_scan's. Every rank must run the backward too.
    """
    steps = dict(dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit)
    segment = ssd_segment_state(x, dt, A, B, **steps)
    entering = _EnteringState.apply(*segment, group)
    return ssd_scan(x, dt, A, B, C, D=D, z=z, initial_states=entering, **steps)


def share_of_state(state, layout, rank, ranks):
    """What a rank holds of the state dict of a whole mixer with this layout (ProjectionLayout)."""
    everything = layout.rows(("z", "x", "B", "C", "dt"), rank, ranks)
    channels, heads = layout.rows(("x",), rank, ranks), layout.rows(("dt",), rank, ranks)
    rows = {
        "in_proj": everything,
        "conv1d": layout.rows(("x", "B", "C"), rank, ranks),
        "norm": channels,
        "A_log": heads,
        "dt_bias": heads,
        "D": heads if len(state["D"]) == layout.heads else channels,
    }
    share = {}
    for name, value in state.items():
        if name == "out_proj.weight":
            share[name] = value[:, channels]
        elif name == "out_proj.bias":
            share[name] = value
        else:
            share[name] = value[rows[name.split(".")[0]]]
    return share
