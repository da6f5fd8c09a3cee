"""add_norm: the residual of a decoding step takes a layer's result, and is normed for the next."""

import torch

_ops = torch.ops.mamba2_cuda


def add_norm(residual, x, weight, *, eps=1e-5):
    """One kernel for two lines of a block.

        residual += x        in place; not where x is None
        y = residual / sqrt(mean(residual^2) + eps) weight      over the last dimension

    residual (b, d), x (b, d), weight (d,): fp64, fp32, bf16 or fp16, each its own. Arithmetic is
    fp32 (fp64 where residual or weight is). No host synchronisation; bitwise repeatable; a row's
    result does not depend on the others.

    Returns y (b, d) in weight's dtype. Not differentiable.

    Raises RuntimeError when an argument does not fit, naming it, what it must be and what it is.
    """
    return _ops.add_norm.default(residual, x, weight, eps)
