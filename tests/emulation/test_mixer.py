"""conv_scan_norm's CUDA host path and kernels on the emulated card."""

import pytest
import torch
from test_conv_scan_norm import CASES, make, plain


def forward(emulated, tensors, cu_seqlens, options, states=(None, None)):
    return emulated.ops.conv_scan_norm_forward(
        *tensors.values(), cu_seqlens, *states, *options.of_forward(), 0
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_three_operators(emulated, case, nan_filled):
    problem = make(**case)
    with torch.no_grad():
        out, _, y, A = forward(emulated, *problem)
        torch.testing.assert_close(out, plain(*problem))
    torch.testing.assert_close(A, -problem[0]["A_log"].detach().exp())
    assert (y.numel() == 0) == (out.numel() == 0 or problem[0]["norm_weight"] is None)


def test_a_sequence_in_two_parts(emulated):
    """States are begun from, and left, in place."""
    tensors, _, options = make(l=12)
    layout = options.layout
    conv = torch.zeros(2, 3, layout.conv_channels, dtype=torch.float64)
    ssm = torch.zeros(2, layout.heads, layout.headdim, layout.d_state, dtype=torch.float64)
    with torch.no_grad():
        whole = forward(emulated, tensors, None, options)[0]
        parts = [
            forward(emulated, tensors | {"zxBCdt": part}, None, options, (conv, ssm))[0]
            for part in tensors["zxBCdt"].split([7, 5], dim=1)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
