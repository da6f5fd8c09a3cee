"""What stands between the mixer's two projections, as one differentiable function.

It is causal_conv1d, ssd_scan and gated_rmsnorm one after another. The forward is one operator,
which cuts their slices out of the projection itself: the host is done sooner than with three. In
the backward their gradients land in one tensor, that of the projection, each in its slice: nothing
is concatenated or copied.
"""

from typing import NamedTuple

import torch

from mamba2_cuda.ops.plan import current_plan
from mamba2_cuda.ops.ssd_scan import autocast

from .layout import ProjectionLayout

_ops = torch.ops.mamba2_cuda
_forward = _ops.conv_scan_norm_forward.default


class Options(NamedTuple):
    """Sizes of the projection, and the options of ssd_scan and gated_rmsnorm by their names."""

    layout: ProjectionLayout
    dt_limit: tuple
    eps: float
    group_size: int
    norm_before_gate: bool

    def of_norm(self):
        """Those of gated_rmsnorm, in its operator's order."""
        return self.eps, self.group_size, self.norm_before_gate

    def of_forward(self):
        """All, in the forward operator's order."""
        layout = self.layout
        sizes = layout.heads, layout.headdim, layout.ngroups, layout.d_state
        return *sizes, *self.dt_limit, *self.of_norm()


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
    states = (None, None) if cache is None else (cache.conv, cache.ssm)
    return _forward(*arrays, *states, *options.of_forward(), current_plan())[0]


def A_of(A_log):
    """-exp(A_log), in fp32 at least."""
    return A_log.to(torch.promote_types(A_log.dtype, torch.float32)).exp().neg_()


class _ConvScanNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, plan, *arrays):
        out, xBC, y, A = _forward(*arrays, None, None, *options.of_forward(), plan)
        ctx.save_for_backward(*arrays, xBC, y, A)
        ctx.options, ctx.plan = options, plan
        return out

    @staticmethod
    def backward(ctx, d_out):
        gradients = _ConvScanNormBackward.apply(d_out, ctx.options, ctx.plan, *ctx.saved_tensors)
        wanted = ctx.needs_input_grad[2:9]
        return None, None, *(g if need else None for g, need in zip(gradients, wanted)), None


class _ConvScanNormBackward(torch.autograd.Function):
    """A Function so that a second differentiation meets it, and is refused."""

    @staticmethod
    def forward(ctx, *arguments):
        return backward(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("Mamba2: a second differentiation is not implemented")


def backward(
    d_out, options, plan, zxBCdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight,
    cu_seqlens, xBC, y, A,
):  # fmt: skip
    """The gradients of the seven tensors from zxBCdt to norm_weight."""
    layout = options.layout
    z, xBC_in, dt = layout.split(zxBCdt)
    d_zxBCdt, d_xBC = torch.empty_like(zxBCdt), torch.empty_like(xBC)
    dz, d_xBC_in, d_dt = layout.split(d_zxBCdt)
    z_of_scan = dz_of_scan = d_norm_weight = None
    if norm_weight is None:
        z_of_scan, dz_of_scan, dy = layout.by_head(z), layout.by_head(dz), d_out
    else:
        dy, d_norm_weight, _ = _ops.gated_rmsnorm_backward.default(
            d_out, y, norm_weight, z, *options.of_norm(), None, dz
        )
    x, B, C = layout.split_conv(xBC)
    dx, dB, dC = layout.split_conv(d_xBC)
    _, _, dA, _, _, dD, _, d_dt_bias, _ = _ops.ssd_scan_backward_out.default(
        layout.by_head(dy), None, x, dt, A, B, C, D, z_of_scan, dt_bias, None, cu_seqlens, None,
        None, True, *options.dt_limit, plan, dx, d_dt, dB, dC, dz_of_scan,
    )  # fmt: skip
    _, d_conv_weight, d_conv_bias, _ = _ops.causal_conv1d_backward.default(
        d_xBC, None, xBC_in, conv_weight[:, 0], conv_bias, None, cu_seqlens, True, d_xBC_in
    )
    # A = -exp(A_log) is its own derivative.
    return d_zxBCdt, d_conv_weight[:, None], d_conv_bias, dA * A, dD, d_dt_bias, d_norm_weight
