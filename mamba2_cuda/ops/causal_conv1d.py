"""causal_conv1d: the short depthwise convolution before the scan, differentiable, and its step."""

import torch

from .once import once
from .ssd_scan import autocast

_ops = torch.ops.mamba2_cuda


def causal_conv1d(
    x, weight, bias=None, *, silu=True, initial_states=None, cu_seqlens=None,
    return_final_states=False,
):  # fmt: skip
    """Convolves each channel of channel-last sequences with its own w taps, causally.

        y_t = act(bias + sum_k weight_k x_{t-w+1+k}),  k = 0 .. w-1;  act(v) = v sigmoid(v) if silu

    Sizes: b batch, l length, d channels, w width, 2 to 4.

    x                (b, l, d)   fp64, fp32, bf16 or fp16; a slice of a wider projection whose
                                 strides and address are multiples of 16 bytes is read in place
    weight, bias     (d, w), (d,)  any of these dtypes
    initial_states   (b, w - 1, d)  x's dtype: the inputs before the first, the oldest first; zeros
                                 when absent
    cu_seqlens       (nseq + 1,) int32 or int64, on x's device: sequence i is the tokens
                                 cu_seqlens[i] .. cu_seqlens[i + 1] of the one row (b = 1), with
                                 states (nseq, w - 1, d). Values are clamped to [0, l]; a token of
                                 no sequence gives y = 0 and zero gradients

    Arithmetic is fp32 (fp64 for fp64). Under autocast x and initial_states are cast. No host
    synchronisation; bitwise repeatable, forward and backward.

    Returns y (b, l, d) in x's dtype, or (y, final_states) with return_final_states: the last w - 1
    inputs of each sequence, (b or nseq, w - 1, d), x's dtype.

    Differentiable once in x, weight, bias and initial_states.

    Raises RuntimeError when an argument does not fit, naming it, what it must be and what it is;
    when memory runs out; when differentiated twice.

    Source: Dao & Gu 2024 (arXiv 2405.21060), section 7.
    """
    x, initial_states = autocast(x, initial_states)
    inputs = (x, weight, bias, initial_states, cu_seqlens)
    if torch.is_grad_enabled():
        y, final_states = _CausalConv1d.apply(silu, return_final_states, *inputs)
    else:
        y, final_states = _ops.causal_conv1d_forward.default(*inputs, silu, return_final_states)
    return (y, final_states) if return_final_states else y


def causal_conv1d_step(state, x, weight, bias=None, *, silu=True, state_indices=None):
    """causal_conv1d for the next token of each sequence, or T of them; `state` is updated in place.

    state          (b, w - 1, d) of x's dtype, contiguous within an entry, as final_states of
                   causal_conv1d; with state_indices (slots, w - 1, d)
    x              (b, d) or (b, T, d)  fp64, fp32, bf16 or fp16
    weight, bias   (d, w), (d,)         any of these dtypes
    state_indices  (b,) int32: the slot of each entry's state; negative (or no slot): padding, which
                   reads and writes no state and whose y is 0

    Returns y, shaped and typed as x. One kernel. Not differentiable. Under autocast x is cast.

    Raises RuntimeError when an argument does not fit, naming it, what it must be and what it is.
    """
    (x,) = autocast(x)
    return _ops.causal_conv1d_step.default(state, x, weight, bias, silu, state_indices)


_backward = once("causal_conv1d", _ops.causal_conv1d_backward.default)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, silu, return_final_states, *inputs):
        y, final_states = _ops.causal_conv1d_forward.default(*inputs, silu, return_final_states)
        ctx.save_for_backward(*inputs)
        ctx.silu = silu
        ctx.return_final_states = return_final_states
        ctx.set_materialize_grads(False)
        if not return_final_states:
            ctx.mark_non_differentiable(final_states)
        return y, final_states

    @staticmethod
    def backward(ctx, dy, d_final_states):
        saved = ctx.saved_tensors  # asked for once: activation checkpointing wants that
        if dy is None:
            dy = torch.zeros_like(saved[0])
        if not ctx.return_final_states:
            d_final_states = None  # torch.compile makes up zeros for the absent output
        gradients = _backward(dy, d_final_states, *saved, ctx.silu, None)
        wanted = ctx.needs_input_grad[2:6]
        return None, None, *(g if need else None for g, need in zip(gradients, wanted)), None
