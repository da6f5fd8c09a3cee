"""conv_scan_norm's CUDA host path and kernels on the emulated card."""

import pytest
import torch
from test_conv_scan_norm import CASES, d_out_of, make, plain, projections, with_gradients


def forward(emulated, tensors, cu_seqlens, options, states=(None, None)):
    return emulated.ops.conv_scan_norm_forward(
        *tensors.values(), cu_seqlens, *states, *options.as_arguments(), 0
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_three_operators(emulated, case, nan_filled):
    problem = make(**case)
    with torch.no_grad():
        out, _, y, A = forward(emulated, *problem)
        torch.testing.assert_close(out, plain(*problem))
    torch.testing.assert_close(A, -problem[0]["A_log"].detach().exp())
    assert (y.numel() == 0) == (out.numel() == 0 or problem[0]["norm_weight"] is None)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients(emulated, case, nan_filled):
    tensors, cu_seqlens, options = make(**case)
    expected = with_gradients(plain, tensors, cu_seqlens, options)
    with torch.no_grad():
        out, *kept = forward(emulated, tensors, cu_seqlens, options)
        given = [t for name, t in tensors.items() if name != "A_log"]
        got = emulated.ops.conv_scan_norm_backward(
            d_out_of(out), *given, cu_seqlens, *kept, *options.as_arguments(), 0
        )
    for (name, t), gradient in zip(tensors.items(), got):
        if t is None:
            assert gradient.numel() == 0
        else:
            torch.testing.assert_close({name: gradient}, {name: expected[name]})


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_with_its_projections(emulated, case, nan_filled):
    tensors, cu_seqlens, options = make(**case)
    u, in_weight, out_weight = projections(tensors, options)
    arrays = [t for name, t in tensors.items() if name != "zxBCdt"]
    with torch.no_grad():
        out = emulated.ops.mixer_forward(
            u, in_weight, *arrays, out_weight, cu_seqlens, None, None, *options.as_arguments(), 0
        )
        expected = plain({**tensors, "zxBCdt": u @ in_weight.T}, cu_seqlens, options)
        torch.testing.assert_close(out, expected @ out_weight.T)


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
