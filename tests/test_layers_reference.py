"""References of the layers around the scan, against torch's own, and Mamba-1's scan."""

import pytest
import torch
import torch.nn.functional as F

from mamba2_cuda import reference

F64 = torch.float64


def normal(*shape):
    return torch.randn(*shape, dtype=F64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("silu", [False, True])
def test_convolution_is_torchs(width, silu):
    x, weight, bias = normal(2, 9, 5), normal(5, width), normal(5)
    expected = F.conv1d(x.mT, weight[:, None], bias, padding=width - 1, groups=5)[..., :9].mT
    expected = F.silu(expected) if silu else expected
    torch.testing.assert_close(reference.causal_conv1d(x, weight, bias, silu=silu), expected)


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 9])
def test_convolution_goes_on_from_its_state(cut):
    x, weight, before = normal(2, 9, 5), normal(5, 4), normal(2, 3, 5)
    whole, last = reference.causal_conv1d(
        x, weight, initial_states=before, return_final_states=True
    )
    first, state = reference.causal_conv1d(
        x[:, :cut], weight, initial_states=before, return_final_states=True
    )
    second, end = reference.causal_conv1d(
        x[:, cut:], weight, initial_states=state, return_final_states=True
    )
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    assert torch.equal(end, last) and torch.equal(last, x[:, -3:])


def test_convolution_of_packed_sequences():
    x, weight, before = normal(1, 20, 5), normal(5, 4), normal(3, 3, 5)
    cu = torch.tensor([2, 4, 4, 15])
    y, final = reference.causal_conv1d(
        x, weight, initial_states=before, cu_seqlens=cu, return_final_states=True
    )
    for i, (begin, end) in enumerate(((2, 4), (4, 4), (4, 15))):
        alone, state = reference.causal_conv1d(
            x[:, begin:end], weight, initial_states=before[i : i + 1], return_final_states=True
        )
        torch.testing.assert_close(y[:, begin:end], alone)
        assert torch.equal(final[i : i + 1], state)
    assert (y[:, :2] == 0).all() and (y[:, 15:] == 0).all()


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("group_size", [None, 4])
def test_gated_rmsnorm_is_torchs(norm_before_gate, group_size):
    x, z, weight = normal(2, 3, 12), normal(2, 3, 12), normal(12)
    options = {"norm_before_gate": norm_before_gate, "group_size": group_size, "eps": 1e-3}
    size = group_size or 12

    def norm(v):
        groups = F.rms_norm(v.unflatten(-1, (-1, size)), (size,), eps=1e-3)
        return groups.flatten(-2) * weight

    expected = norm(x) * F.silu(z) if norm_before_gate else norm(x * F.silu(z))
    torch.testing.assert_close(reference.gated_rmsnorm(x, weight, z, **options), expected)
    torch.testing.assert_close(reference.gated_rmsnorm(x, weight, **options), norm(x))


def selective_inputs(l=13, d=6, n=3):
    return dict(
        x=normal(2, l, d), dt=normal(2, l, d), A=-torch.rand(d, n, dtype=F64), B=normal(2, l, n),
        C=normal(2, l, n), D=normal(d), z=normal(2, l, d), dt_bias=normal(d),
    )  # fmt: skip


@pytest.mark.parametrize("l", [0, 1, 2, 13, 16])
def test_selective_scan_forms_agree(l):
    inputs = {k: v.requires_grad_() for k, v in selective_inputs(l).items()}
    outputs = [
        reference.selective_scan(**inputs, dt_softplus=True, form=form)
        for form in ("recurrent", "parallel")
    ]
    torch.testing.assert_close(*outputs)
    dy = torch.randn_like(outputs[0])
    leaves = list(inputs.values())
    grads = [torch.autograd.grad(y, leaves, dy, materialize_grads=True) for y in outputs]
    torch.testing.assert_close(*grads)


def test_selective_scan_with_one_decay_a_head_is_ssd():
    """Mamba-2 is Mamba-1 with A a scalar per head and dt shared by its channels."""
    v = selective_inputs(d=6, n=3)
    A, dt = -torch.rand(2, dtype=F64), normal(2, 13, 2)
    shared = {**v, "A": A.repeat_interleave(3)[:, None].expand(6, 3),
              "dt": dt.repeat_interleave(3, -1), "dt_bias": None}  # fmt: skip
    y = reference.selective_scan(**shared, dt_softplus=True)
    x, z = (v[k].unflatten(-1, (2, 3)) for k in ("x", "z"))
    B, C = (v[k][:, :, None] for k in ("B", "C"))
    expected = reference.ssd_scan(
        x, dt, A, B, C, D=v["D"].view(2, 3), z=z, dt_softplus=True, form="recurrent"
    )
    torch.testing.assert_close(y, expected.flatten(-2))
