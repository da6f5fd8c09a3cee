"""ssd_scan: the state space duality operator, differentiable, on CPU and CUDA."""

import math

import torch

from .once import once
from .plan import current_plan

_ops = torch.ops.mamba2_cuda


def ssd_scan(
    x, dt, A, B, C, *, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, math.inf),
    initial_states=None, cu_seqlens=None, seq_idx=None, return_final_states=False,
    save_states=False,
):  # fmt: skip
    """Runs the selective state space model of Mamba-2 over sequences.

        delta_t = clamp(softplus(dt_t + dt_bias) if dt_softplus else dt_t + dt_bias, dt_limit)
        H_t     = exp(delta_t A) H_{t-1} + delta_t x_t B_t^T
        y_t     = (H_t C_t + D x_t) silu(z_t)

    for each head; the factor silu(z_t) is there when z is. Head i reads group i // (h / g) of B, C.

    Sizes: b batch, l length, h heads, p head dim, g groups, n state dim; p, n <= 256, h % g == 0.

    x, z             (b, l, h, p)  fp64, fp32, bf16 or fp16
    dt               (b, l, h)     any of these dtypes, its own
    A, dt_bias       (h,)          likewise; A <= 0 is the caller's duty
    B, C             (b, l, g, n)  x's dtype, as z
    D                (h,), (h, p)  any of these dtypes
    initial_states   (b, h, p, n)  fp32 (fp64 when x is) or x's dtype; zeros when absent
    cu_seqlens       (nseq + 1,)   int32 or int64, on x's device: sequence i is the tokens
                                   cu_seqlens[i] .. cu_seqlens[i + 1] of the one row (b = 1), with
                                   states (nseq, h, p, n). Values are clamped to [0, l]; a token of
                                   no sequence gives y = 0 and zero gradients
    seq_idx          (b, l)        int32: the state is forgotten where it changes within a row;
                                   initial_states reaches only the first run. Not with cu_seqlens
    save_states                    keeps chunk states for a faster backward where the kernels can
                                   use them: one state in x's dtype a head and 128 tokens, held
                                   until the backward (docs/kernels_backward.md has what it costs
                                   and gives). The CPU keeps none

    Arithmetic and states are fp32 (fp64 for fp64). Under autocast x, B, C and z, and nothing else,
    are cast. No host synchronisation; bitwise repeatable, forward and backward.

    Returns y (b, l, h, p) in x's dtype, or (y, final_states) with return_final_states:
    final_states (b or nseq, h, p, n), fp32 (fp64 when x is).

    Differentiable once in x, dt, A, B, C, D, z, dt_bias and initial_states.

    Raises RuntimeError when an argument does not fit, naming it, what it must be and what it is;
    when memory runs out; when differentiated twice.

    Source: Dao & Gu 2024 (arXiv 2405.21060), equation 1 and section 6.
    """
    x, B, C, z = autocast(x, B, C, z)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx)
    delta_options = (dt_softplus, *dt_limit)
    if torch.is_grad_enabled():
        return _SsdScan.apply(
            delta_options, return_final_states, save_states, current_plan(), *inputs
        )
    y, final_states, _ = _forward(
        *inputs, *delta_options, return_final_states, False, current_plan()
    )
    return (y, final_states) if return_final_states else y


def autocast(x, *others):
    """x and its kin in the dtype that autocast wants."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return (x, *others)
    return tuple(t if t is None else t.to(dtype) for t in (x, *others))


def autocast_dtype(t):
    """What autocast would have t cast to, or None: fp64 stays, as in torch's own operators."""
    device = t.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or t.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


_forward = _ops.ssd_scan_forward.default
_backward = once("ssd_scan", _ops.ssd_scan_backward.default)


class _SsdScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, delta_options, return_final_states, save_states, plan, *inputs):
        y, final_states, chunk_states = _forward(
            *inputs, *delta_options, return_final_states, save_states, plan
        )
        ctx.save_for_backward(*inputs, chunk_states if save_states else None)
        ctx.options = (*delta_options, plan)
        ctx.set_materialize_grads(False)
        return (y, final_states) if return_final_states else y

    @staticmethod
    def backward(ctx, dy, d_final_states=None):
        saved = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(saved[0])
        gradients = _backward(dy, d_final_states, *saved, *ctx.options)
        wanted = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad[4:13])]
        return None, None, None, None, *wanted, None, None
