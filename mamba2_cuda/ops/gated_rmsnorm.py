"""gated_rmsnorm: the normalisation after the scan, fused with its gate, differentiable."""

import torch

from .once import once

_ops = torch.ops.mamba2_cuda


def gated_rmsnorm(x, weight, z=None, *, eps=1e-5, group_size=None, norm_before_gate=False):
    """Normalises groups of channels by their root mean square, with the gate silu(z).

        y = norm(x silu(z)) weight,  or  y = norm(x) weight silu(z)  if norm_before_gate
        norm(v) = v / sqrt(mean(v^2) + eps)  over each group of group_size channels

    Sizes: d channels, the last dimension of x; group_size divides d and defaults to it.

    x, z     (..., d)  fp64, fp32, bf16 or fp16, one dtype; z is optional. Slices (b, l, d) of a
                       wider projection whose strides and addresses are multiples of 16 bytes are
                       read in place
    weight   (d,)      any of these dtypes

    Arithmetic is fp32 (fp64 for fp64); autocast casts nothing, as in torch's own norms. No host
    synchronisation; bitwise repeatable, forward and backward.

    Returns y, shaped and typed as x. Differentiable once in x, weight and z.

    Raises RuntimeError when an argument does not fit, naming it, what it must be and what it is;
    when memory runs out; when differentiated twice.

    Source: Dao & Gu 2024 (arXiv 2405.21060), section 7 ("extra normalization").
    """
    shape = x.shape
    x, z = as_rows(x), as_rows(z)
    options = (eps, shape[-1] if group_size is None else group_size, norm_before_gate)
    if torch.is_grad_enabled():
        y = _GatedRmsnorm.apply(x, weight, z, *options)
    else:
        y = _ops.gated_rmsnorm_forward.default(x, weight, z, *options)
    return y.view(shape)


def as_rows(t):
    """A tensor (..., d) as (b, l, d), with no copy where strides allow."""
    if t is None or t.dim() == 3:
        return t
    return t.unsqueeze(-2) if t.dim() == 2 else t.reshape(1, -1, t.shape[-1])


_backward = once("gated_rmsnorm", _ops.gated_rmsnorm_backward.default)


class _GatedRmsnorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, z, *options):
        ctx.save_for_backward(x, weight, z)
        ctx.options = options
        return _ops.gated_rmsnorm_forward.default(x, weight, z, *options)

    @staticmethod
    def backward(ctx, dy):
        gradients = _backward(dy, *ctx.saved_tensors, *ctx.options, None, None)
        wanted = ctx.needs_input_grad[:3]
        return *(g if need else None for g, need in zip(gradients, wanted)), None, None, None
