"""One mixer shared by several ranks: heads and groups each have a rank, u and the result all have.

A rank projects the whole u to its own z, x, B, C, dt, and its channels back to a summand of the
result. So a layer has one all-reduce forward, of the result, and one backward, of u's gradient.
Source: paper, section 8.1.
"""

import torch
import torch.distributed as dist


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
