"""add_norm: the residual takes what a layer adds to it, and is normed for the next layer."""

import torch

from mamba2_cuda._dtypes import DTYPE_CODE

from .once import once

_ops = torch.ops.mamba2_cuda
_forward = _ops.add_norm_forward.default
_backward = once("add_norm", _ops.add_norm_backward.default)
_in_place = _ops.add_norm_.default


def add_norm(residual, x, weight, *, eps=1e-5, dtype=None):
    """One kernel for two lines of a block, and one for their gradients.

        residual_out = residual + x        residual itself where x is None
        y = residual_out / sqrt(mean(residual_out^2) + eps) weight     over the last dimension

    residual   (..., d)  fp64, fp32, bf16 or fp16
    x          like residual, or None: any of these dtypes
    weight     (d,)      any of these dtypes
    dtype      of y: what the next layer computes in; weight's if not given

    Arithmetic is fp32 (fp64 where residual or weight is); autocast casts nothing. No host
    synchronisation; bitwise repeatable, forward and backward; a row's result does not depend on the
    others.

    Returns residual_out, shaped and typed as residual, and y (..., d). Differentiable once in
    residual, x and weight. For the backward it keeps residual_out.

    Raises RuntimeError when an argument does not fit, naming it, what it must be and what it is;
    when memory runs out; when differentiated twice.
    """
    code = DTYPE_CODE[dtype or weight.dtype]
    run = _AddNorm.apply if torch.is_grad_enabled() else _forward
    residual_out, y = run(residual, x, weight, eps, code)
    return residual if x is None else residual_out, y


def add_norm_(residual, x, weight, *, eps=1e-5, dtype=None):
    """add_norm of rows (b, d), of any distance, in place: residual += x. Returns y alone.

    Not differentiable.
    """
    return _in_place(residual, x, weight, eps, DTYPE_CODE[dtype or weight.dtype])


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, x, weight, eps, dtype):
        residual_out, y = _forward(residual, x, weight, eps, dtype)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.x_dtype = eps, -1 if x is None else DTYPE_CODE[x.dtype]
        if x is None:
            ctx.mark_non_differentiable(residual_out)  # nothing
        ctx.save_for_backward(residual if x is None else residual_out, weight)
        return residual_out, y

    @staticmethod
    def backward(ctx, d_residual_out, dy):
        residual_out, weight = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(residual_out)
        if ctx.x_dtype < 0:
            d_residual_out = None  # torch.compile makes up zeros for the absent output
        d_residual, dx, dweight = _backward(
            dy, d_residual_out, residual_out, weight, ctx.eps, ctx.x_dtype
        )
        if ctx.x_dtype == DTYPE_CODE[residual_out.dtype]:
            dx = d_residual
        gradients, wanted = (d_residual, dx, dweight), ctx.needs_input_grad[:3]
        return *(g if need else None for g, need in zip(gradients, wanted)), None, None
