"""norm_linear: a norm and the projection behind it, in one kernel, for the few rows of decoding."""

from functools import cache

import torch

from mamba2_cuda._dtypes import DTYPE_CODE

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
    early_weights           a promise: what was queued just before does not write the weights. They
                            are then read while that still runs

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


def norm_linear_add_norm_(
    residual, x, norm_weight, weight, bias=None, *, next_weight, z=None, eps=1e-5, group_size=None,
    norm_before_gate=False, next_eps=1e-5, dtype=None, early_weights=False,
):  # fmt: skip
    """What stands between two layers of a decoding step: norm_linear with residual, and add_norm_.

        residual += norm(x, z) weight^T + bias
        y         = residual / sqrt(mean(residual^2) + next_eps) next_weight

    residual      (b, o)   any of norm_linear's dtypes, updated in place
    next_weight   (o,)     any of them
    dtype                  of y: next_weight's if not given

    The rest is norm_linear's. Fast on CUDA for any number of rows in bf16 with an fp32 residual,
    one group of channels and no bias: x gate(z) norm_weight is then rounded to bf16, and divided by
    its root mean square behind the product. Right for the rest, where the normed row is rounded.

    Returns y (b, o). Not differentiable.

    Raises RuntimeError when an argument does not fit, as norm_linear and add_norm_ do.
    """
    return _ops.norm_linear_add_norm_.default(
        residual, x, norm_weight, z, weight, bias, next_weight, eps,
        x.shape[-1] if group_size is None else group_size, norm_before_gate, next_eps,
        DTYPE_CODE[dtype or next_weight.dtype], early_weights,
    )  # fmt: skip


@cache
def linear_rows_at_once(b, o):
    """Whether linear_rows of b rows and o outputs has so few blocks that all of them run at once:
    with more, a library's product is faster."""
    return _ops.linear_rows_at_once.default(b, o)


def linear_rows(
    x, weight, *, conv_state=None, conv_weight=None, conv_bias=None, conv_first=0, silu=True,
    early_weights=False,
):  # fmt: skip
    """A projection of the rows of a decoding step, more of them than norm_linear is for, and
    causal_conv1d_step of those outputs that are channels of a convolution, in their place.

        y = x weight^T;  with conv_state  y_i = act(bias + sum_k conv_weight_k before_k)

    Sizes: b rows, d channels and o outputs, multiples of 8; c channels of the convolution, w its
    width, 2 to 4.

    x              (b, d)         bf16; rows may lie apart
    weight         (o, d)         bf16
    conv_state     (b, w - 1, c)  bf16, contiguous within a row, updated in place; or None
    conv_weight    (c, w)         bf16, as conv_bias (c,), which is optional
    conv_first                    the outputs conv_first .. conv_first + c are the channels; both
                                  even
    early_weights                 as in norm_linear, a promise for conv_state too

    Arithmetic is fp32; the product is rounded before it is convolved. No host synchronisation;
    bitwise repeatable; a row's result does not depend on the others. Returns y (b, o), bf16. Not
    differentiable.

    Raises RuntimeError when an argument does not fit, naming it, what it must be and what it is.
    """
    return _ops.linear_rows.default(
        x, weight, conv_state, conv_weight, conv_bias, conv_first, silu, early_weights
    )
