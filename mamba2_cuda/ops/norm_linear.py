"""norm_linear: a norm and the projection behind it, in one kernel, for the few rows of decoding."""

import torch

_ops = torch.ops.mamba2_cuda


def norm_linear(
    x, norm_weight, weight, bias=None, *, z=None, residual=None, eps=1e-5, group_size=None,
    norm_before_gate=False, early_weights=False,
):  # fmt: skip
    """Norms rows as gated_rmsnorm does, and projects them.

        y = norm(x, z) weight^T + bias,  added to the residual in place where there is one

    Sizes: b rows, d channels, up to 8192, o outputs.

    x, z           (b, d)   fp64, fp32, bf16 or fp16, one dtype; z is optional; rows may lie apart
    norm_weight    (d,)     any of these dtypes, as bias (o,)
    weight         (o, d)   any of these dtypes: the normed row is rounded to it
    residual       (b, o)   any of these dtypes, updated in place
    early_weights           a promise: what was queued just before does not write `weight`. It is
                            then read while that still runs

    The norm's options are those of gated_rmsnorm. Arithmetic is fp32 (fp64 for weights of fp64).
    No host synchronisation; bitwise repeatable; a row's result does not depend on the others. Fast
    on CUDA for 16-bit weights, up to 8 rows and one group of channels; right for the rest.

    Returns y (b, o) in weight's dtype, or the residual. Not differentiable.

    Raises RuntimeError when an argument does not fit, naming it, what it must be and what it is.
    """
    y = _ops.norm_linear.default(
        x, norm_weight, z, weight, bias, residual, eps,
        x.shape[-1] if group_size is None else group_size, norm_before_gate, early_weights,
    )  # fmt: skip
    return y if residual is None else residual
