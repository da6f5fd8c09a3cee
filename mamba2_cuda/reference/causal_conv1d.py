"""The short convolution before the scan: depthwise, causal, over channel-last sequences."""

import torch
import torch.nn.functional as F

from .discretise import working_dtype
from .ssd_scan import sequence_bounds


def causal_conv1d(
    x,
    weight,
    bias=None,
    *,
    silu=True,
    initial_states=None,
    cu_seqlens=None,
    return_final_states=False,
):
    """y_t = silu(bias + sum_k weight_k x_{t-w+1+k}), k = 0 .. w-1, for each channel by itself.

    x (b, l, d), weight (d, w), bias (d,). Before the first token lie initial_states
    (b, w - 1, d), the oldest first, or zeros. With cu_seqlens (nseq + 1,), b = 1, each sequence has
    its own (nseq, w - 1, d), and tokens outside give 0. Computed in fp64 if x is fp64, else fp32.
    Returns y (b, l, d) in x's dtype, or y and the last w - 1 inputs of each sequence in x's dtype.
    Source: paper, section 7.
    """
    work, w = working_dtype(x), weight.size(1)
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, x.size(1))
    if initial_states is None:
        sequences = x.size(0) if bounds is None else len(bounds)
        initial_states = x.new_zeros(sequences, w - 1, x.size(2))
    initial_states = initial_states.to(x.dtype)

    def convolve(x, state):
        window = torch.cat([state, x], 1)
        taps = (window[:, k : k + x.size(1)].to(work) for k in range(w))
        y = sum(weight[:, k].to(work) * tap for k, tap in enumerate(taps))
        y = y if bias is None else y + bias.to(work)
        return (F.silu(y) if silu else y).to(x.dtype), window[:, x.size(1) :]

    if bounds is None:
        y, final = convolve(x, initial_states)
    else:
        y, final, end = [], [initial_states[:0]], 0
        for i, (begin, stop) in enumerate(bounds):
            y_i, final_i = convolve(x[:, begin:stop], initial_states[i : i + 1])
            y += [torch.zeros_like(x[:, end : max(end, begin)]), y_i]
            final.append(final_i)
            end = stop
        y, final = torch.cat([*y, torch.zeros_like(x[:, end:])], 1), torch.cat(final)
    return (y, final) if return_final_states else y
