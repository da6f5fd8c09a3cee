"""What stands between the mixer's two projections, as one differentiable function.

It is causal_conv1d, ssd_scan and gated_rmsnorm one after another. Each direction is one operator,
which cuts their slices out of the projection itself: the host is done sooner than with three. In
the backward their gradients land in one tensor, that of the projection, each in its slice: nothing
is concatenated or copied.
"""

from typing import NamedTuple

import torch

from mamba2_cuda.ops.once import once
from mamba2_cuda.ops.plan import current_plan
from mamba2_cuda.ops.ssd_scan import autocast

from .layout import ProjectionLayout

_ops = torch.ops.mamba2_cuda
_forward = _ops.conv_scan_norm_forward.default
_backward = once("Mamba2", _ops.conv_scan_norm_backward.default)
_mixer = _ops.mixer_forward.default


class Options(NamedTuple):
    """Sizes of the projection, and the options of ssd_scan and gated_rmsnorm by their names."""

    layout: ProjectionLayout
    dt_limit: tuple
    eps: float
    group_size: int
    norm_before_gate: bool

    def as_arguments(self):
        """All, in the operators' order."""
        layout = self.layout
        sizes = layout.heads, layout.headdim, layout.ngroups, layout.d_state
        return *sizes, *self.dt_limit, self.eps, self.group_size, self.norm_before_gate


def conv_scan_norm(
    zxBCdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, cu_seqlens, options, cache=None
):
    """The mixer without its projections.

        x, B, C = silu(causal_conv1d(x, B, C))
        y       = ssd_scan(x, dt, -exp(A_log), B, C) + D x      dt = softplus(dt + dt_bias), limited
        out     = norm(y, z)      y silu(z) when norm_weight is None

    zxBCdt       (b, l, width)   the projection [z | x | B | C | dt] of options.layout
    conv_weight  (channels, 1, w)   over [x | B | C]; conv_bias (channels,) or None
    A_log, D, dt_bias            (h,); D also (h, p)
    norm_weight  (h p,) or None
    cu_seqlens   (nseq + 1,) or None: packed sequences, as ssd_scan has them
    cache        a MixerCache that is begun from and moved on, where no gradient is wanted

    Returns (b, l, h p) in zxBCdt's dtype. Under autocast zxBCdt is cast. Differentiable once in all
    but cu_seqlens. For the backward it keeps zxBCdt, y and the convolution's output.

    Source: Dao & Gu 2024 (arXiv 2405.21060), section 7.1.
    """
    (zxBCdt,) = autocast(zxBCdt)
    arrays = (zxBCdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, cu_seqlens)
    if torch.is_grad_enabled():
        if cache is not None:
            raise RuntimeError("conv_scan_norm: a cache is for torch.no_grad")
        return _ConvScanNorm.apply(options, current_plan(), *arrays)
    return _forward(*arrays, *states_of(cache), *options.as_arguments(), current_plan())[0]


def mixer(
    u, in_weight, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, out_weight, cu_seqlens,
    options, cache=None,
):  # fmt: skip
    """conv_scan_norm between two projections without bias, as one operator and without gradients.

    u           (b, l, d_model)
    in_weight   (width, d_model), out_weight (d_model, h p), of u's dtype

    Returns (b, l, d_model). The host is done sooner than with three operators.
    """
    return _mixer(
        u, in_weight, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, out_weight,
        cu_seqlens, *states_of(cache), *options.as_arguments(), current_plan(),
    )  # fmt: skip


def states_of(cache):
    return (None, None) if cache is None else (cache.conv, cache.ssm)


def A_of(A_log):
    """-exp(A_log), in fp32 at least."""
    return A_log.to(torch.promote_types(A_log.dtype, torch.float32)).exp().neg_()


class _ConvScanNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, plan, *arrays):
        out, xBC, y, A = _forward(*arrays, None, None, *options.as_arguments(), plan)
        zxBCdt, conv_weight, conv_bias, _, *others = arrays
        ctx.save_for_backward(zxBCdt, conv_weight, conv_bias, *others, xBC, y, A)
        ctx.options = (*options.as_arguments(), plan)
        return out

    @staticmethod
    def backward(ctx, d_out):
        gradients = _backward(d_out, *ctx.saved_tensors, *ctx.options)
        wanted = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad[2:9])]
        return None, None, *wanted, None
