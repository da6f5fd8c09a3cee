"""Shapes and dtypes of what each operator returns, for torch.compile (csrc/ops.cpp has both)."""

import torch

from ._dtypes import DTYPE_CODE, DTYPES

fake = torch.library.register_fake


def state_dtype(x):
    """Of states and of the gradients of parameters."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def absent(x):
    return x.new_empty(0, dtype=state_dtype(x))


def like(t, x, dtype=None):
    """A contiguous tensor of t's shape; absent when t is."""
    return absent(x) if t is None else t.new_empty(t.shape, dtype=dtype)


def kept_numel(x, B, z, nseq, packed, plan):
    """Elements of the chunk states that save_states keeps: the plan's choice for x's card."""
    if x.device.type != "cuda":
        return 0
    card = torch.cuda.get_device_properties(x.device)
    return torch.ops.mamba2_cuda.ssd_scan_chunk_states_numel(
        *map(int, (*x.shape, *B.shape[2:], nseq)), packed, z is not None, DTYPE_CODE[x.dtype],
        card.major, card.minor, card.multi_processor_count, plan,
    )  # fmt: skip


@fake("mamba2_cuda::ssd_scan_forward")
def _(
    x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx,
    dt_softplus, dt_min, dt_max, return_final_states, save_states, plan,
):  # fmt: skip
    b, _, h, p = x.shape
    nseq = b if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_states = absent(x)
    if return_final_states:
        final_states = x.new_empty(nseq, h, p, B.shape[3], dtype=state_dtype(x))
    kept = kept_numel(x, B, z, nseq, cu_seqlens is not None, plan) if save_states else 0
    return x.new_empty(x.shape), final_states, x.new_empty(kept)


@fake("mamba2_cuda::ssd_scan_backward")
def ssd_scan_backward(
    dy, d_final_states, x, dt, A, B, C, D, z, dt_bias, initial_states, *_options
):  # fmt: skip
    state = state_dtype(x)
    return (
        like(x, x), like(dt, x), like(A, x, state), like(B, x), like(C, x), like(D, x, state),
        like(z, x), like(dt_bias, x, state), like(initial_states, x, state),
    )  # fmt: skip


@fake("mamba2_cuda::ssd_scan_backward_out")
def _(
    dy, d_final_states, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, seq_idx,
    chunk_states, dt_softplus, dt_min, dt_max, plan, dx, d_dt, dB, dC, dz,
):  # fmt: skip
    gradients = ssd_scan_backward(dy, None, x, dt, A, B, C, D, z, dt_bias, initial_states)
    destinations = (dx, d_dt, None, dB, dC, None, dz, None, None)
    return tuple(g if to is None else absent(x) for g, to in zip(gradients, destinations))


@fake("mamba2_cuda::ssd_segment_state_forward")
def _(x, dt, A, B, *_options):
    b, _, h, p = x.shape
    state = state_dtype(x)
    return x.new_empty(b, h, p, B.shape[3], dtype=state), x.new_empty(b, h, dtype=state)


@fake("mamba2_cuda::ssd_segment_state_backward")
def _(d_state, d_log_decay, x, dt, A, B, dt_bias, *_options):
    state = state_dtype(x)
    return like(x, x), like(dt, x), like(A, x, state), like(B, x), like(dt_bias, x, state)


@fake("mamba2_cuda::ssd_step")
def _(state, x, *_options):
    return x.new_empty(x.shape)


@fake("mamba2_cuda::causal_conv1d_forward")
def _(x, weight, bias, initial_states, cu_seqlens, silu, return_final_states):
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = (nseq, weight.shape[1] - 1, x.shape[2]) if return_final_states else (0,)
    return x.new_empty(x.shape), x.new_empty(states)


@fake("mamba2_cuda::causal_conv1d_backward")
def _(dy, d_final_states, x, weight, bias, initial_states, cu_seqlens, silu, dx):
    state = state_dtype(x)
    return (
        like(x if dx is None else None, x), like(weight, x, state), like(bias, x, state),
        x.new_empty(0) if initial_states is None else like(initial_states, x),
    )  # fmt: skip


@fake("mamba2_cuda::causal_conv1d_step")
def _(state, x, *_options):
    return x.new_empty(x.shape)


@fake("mamba2_cuda::gated_rmsnorm_forward")
def _(x, *_options):
    return x.new_empty(x.shape)


@fake("mamba2_cuda::gated_rmsnorm_backward")
def _(dy, x, weight, z, eps, group_size, norm_before_gate, dx, dz):
    return (
        like(x if dx is None else None, x), like(weight, x, state_dtype(x)),
        like(z if dz is None else None, x),
    )  # fmt: skip


@fake("mamba2_cuda::conv_scan_norm_forward")
def _(
    zxBCdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, cu_seqlens, conv_state,
    ssm_state, h, p, *_options,
):  # fmt: skip
    def rows(channels):
        return zxBCdt.new_empty(*zxBCdt.shape[:2], channels)

    y = zxBCdt.new_empty(0) if norm_weight is None else rows(h * p)
    A = A_log.new_empty(h, dtype=state_dtype(A_log))
    return rows(h * p), rows(conv_weight.shape[0]), y, A


@fake("mamba2_cuda::conv_scan_norm_backward")
def _(
    d_out, zxBCdt, conv_weight, conv_bias, D, dt_bias, norm_weight, cu_seqlens, xBC, y, A,
    *_options,
):  # fmt: skip
    parameters = (conv_weight, conv_bias, A, D, dt_bias, norm_weight)
    of_parameters = (like(t, zxBCdt, state_dtype(zxBCdt)) for t in parameters)
    return like(zxBCdt, zxBCdt), *of_parameters


@fake("mamba2_cuda::mixer_forward")
def _(u, *_options):
    return u.new_empty(u.shape)


@fake("mamba2_cuda::norm_linear")
def _(x, norm_weight, z, weight, bias, residual, *_options):
    return weight.new_empty((x.shape[0], weight.shape[0]) if residual is None else 0)


@fake("mamba2_cuda::norm_linear_add_norm_")
def _(residual, x, norm_weight, z, weight, bias, next_weight, *options):
    return weight.new_empty(residual.shape, dtype=DTYPES[options[-2]])


@fake("mamba2_cuda::linear_rows")
def _(x, weight, *_options):
    return x.new_empty(x.shape[0], weight.shape[0])


@fake("mamba2_cuda::add_norm_forward")
def _(residual, x, weight, eps, dtype):
    residual_out = residual.new_empty(0) if x is None else like(residual, residual)
    return residual_out, residual.new_empty(residual.shape, dtype=DTYPES[dtype])


@fake("mamba2_cuda::add_norm_backward")
def _(dy, d_residual_out, residual_out, weight, eps, x_dtype):
    own = DTYPE_CODE[residual_out.dtype]
    dx = residual_out.new_empty(0)
    if x_dtype not in (-1, own):
        dx = residual_out.new_empty(residual_out.shape, dtype=DTYPES[x_dtype])
    wide = torch.float64 in (residual_out.dtype, weight.dtype)
    dweight = weight.new_empty(weight.shape, dtype=torch.float64 if wide else torch.float32)
    return like(residual_out, residual_out), dx, dweight


@fake("mamba2_cuda::add_norm_")
def _(residual, x, weight, eps, dtype):
    return weight.new_empty(residual.shape, dtype=DTYPES[dtype])


@fake("mamba2_cuda::cross_entropy_forward")
def _(logits, targets, scale):
    return logits.new_empty(logits.shape[0], dtype=state_dtype(logits))


@fake("mamba2_cuda::cross_entropy_backward")
def _(gradient, d_loss):
    return None
