"""What ssd_scan says when it is called wrongly: the operator, the argument, wanted, got."""

import re

import pytest
import torch
from cases import Case, make_gradients, make_inputs

import mamba2_cuda

CASE = Case(b=2, l=12, h=6, p=16, g=2, n=8, D="h", z=True, dt_bias=True, initial_states="working")


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def cu(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


# argument -> value; what the message says after "ssd_scan: "
WRONG = {
    "x is 3-d": ({"x": zeros(2, 12, 6)}, "x must be (b, l, h, p), got (2, 12, 6)"),
    "x is int": (
        {"x": zeros(2, 12, 6, 16, dtype=torch.int32)},
        "x must be torch.float64 or torch.float32 or torch.bfloat16 or torch.float16, "
        "got torch.int32",
    ),
    "p is 257": (
        {"x": zeros(2, 12, 6, 257)},
        "x must be (b, l < 2^31, h >= 1, 1 <= p <= 256), got (2, 12, 6, 257)",
    ),
    "no heads": (
        {"x": zeros(2, 12, 0, 16)},
        "x must be (b, l < 2^31, h >= 1, 1 <= p <= 256), got (2, 12, 0, 16)",
    ),
    "B of another length": (
        {"B": zeros(2, 11, 2, 8)},
        "B must be (b=2, l=12, g, n), got (2, 11, 2, 8)",
    ),
    "B of another dtype": (
        {"B": zeros(2, 12, 2, 8, dtype=torch.float16)},
        "B must be torch.float32, got torch.float16",
    ),
    "g does not divide h": (
        {"B": zeros(2, 12, 4, 8)},
        "B's g must be a divisor of h=6, got 4",
    ),
    "n is 257": ({"B": zeros(2, 12, 2, 257)}, "B's n must be in 1..256, got 257"),
    "C of another n": (
        {"C": zeros(2, 12, 2, 9)},
        "C must be (b=2, l=12, g=2, n=8), got (2, 12, 2, 9)",
    ),
    "C of another dtype": (
        {"C": zeros(2, 12, 2, 8, dtype=torch.float64)},
        "C must be torch.float32, got torch.float64",
    ),
    "dt transposed": ({"dt": zeros(2, 6, 12)}, "dt must be (b=2, l=12, h=6), got (2, 6, 12)"),
    "dt is int": (
        {"dt": zeros(2, 12, 6, dtype=torch.int64)},
        "dt must be torch.float64 or torch.float32 or torch.bfloat16 or torch.float16, "
        "got torch.int64",
    ),
    "A per channel": ({"A": zeros(6, 16)}, "A must be (h=6,), got (6, 16)"),
    "dt_bias of another h": ({"dt_bias": zeros(5)}, "dt_bias must be (h=6,), got (5,)"),
    "D transposed": ({"D": zeros(16, 6)}, "D must be (h=6,) or (h=6, p=16), got (16, 6)"),
    "z is half as wide": (
        {"z": zeros(2, 12, 6, 8)},
        "z must be (b=2, l=12, h=6, p=16), got (2, 12, 6, 8)",
    ),
    "z of another dtype": (
        {"z": zeros(2, 12, 6, 16, dtype=torch.bfloat16)},
        "z must be torch.float32, got torch.bfloat16",
    ),
    "states transposed": (
        {"initial_states": zeros(2, 6, 8, 16)},
        "initial_states must be (b=2, h=6, p=16, n=8), got (2, 6, 8, 16)",
    ),
    "states in half": (
        {"initial_states": zeros(2, 6, 16, 8, dtype=torch.bfloat16)},
        "initial_states must be torch.float32, got torch.bfloat16",
    ),
    "limits exchanged": (
        {"dt_limit": (1.0, 0.5)},
        "dt_limit must be (min, max) with min <= max, got (1, 0.5)",
    ),
    "a packed batch": ({"cu_seqlens": cu(0, 12)}, "x's b must be 1 with cu_seqlens, got 2"),
    "bounds are 2-d": (
        {"cu_seqlens": cu(0, 12)[None]},
        "cu_seqlens must be (nseq + 1,), got (1, 2)",
    ),
    "bounds are floats": (
        {"cu_seqlens": cu(0, 12, dtype=torch.float32)},
        "cu_seqlens must be torch.int32 or torch.int64, got torch.float32",
    ),
    "no bounds": ({"cu_seqlens": cu()}, "cu_seqlens must be (nseq + 1,), got (0,)"),
    "seq_idx of one row": (
        {"seq_idx": zeros(1, 12, dtype=torch.int32)},
        "seq_idx must be (b=2, l=12), got (1, 12)",
    ),
    "seq_idx is int64": (
        {"seq_idx": zeros(2, 12, dtype=torch.int64)},
        "seq_idx must be torch.int32, got torch.int64",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_message(name, device):
    wrong, message = WRONG[name]
    wrong = {k: v.to(device) if torch.is_tensor(v) else v for k, v in wrong.items()}
    with pytest.raises(RuntimeError) as refused:
        mamba2_cuda.ssd_scan(**{**make_inputs(CASE, device), **wrong})
    assert str(refused.value) == f"ssd_scan: {message}"


def test_messages_with_packed_sequences(device):
    case = Case(**{**vars(CASE), "b": 1, "cu_seqlens": (0, 5, 12)})
    inputs = make_inputs(case, device)
    states = zeros(1, 6, 16, 8).to(device)
    with pytest.raises(RuntimeError, match=re.escape("(nseq=2, h=6, p=16, n=8), got (1, 6, 16")):
        mamba2_cuda.ssd_scan(**{**inputs, "initial_states": states})
    runs = zeros(1, 12, dtype=torch.int32).to(device)
    with pytest.raises(RuntimeError, match="ssd_scan: seq_idx must be None with cu_seqlens"):
        mamba2_cuda.ssd_scan(**{**inputs, "seq_idx": runs})


@pytest.mark.parametrize("name", ["dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"])
def test_all_on_one_device(name, cuda):
    inputs = make_inputs(CASE, cuda)
    inputs[name] = inputs[name].cpu()
    with pytest.raises(RuntimeError, match=rf"ssd_scan: {name} must be on cuda:0, got cpu"):
        mamba2_cuda.ssd_scan(**inputs)


# Gradients reach the operators from autograd, which gives them the right shapes; a caller of the
# op itself, as with destinations, may not.
WRONG_GRADIENTS = {
    "dy": (zeros(2, 12, 6, 15), "dy must be (b=2, l=12, h=6, p=16), got (2, 12, 6, 15)"),
    "d_final_states": (
        zeros(2, 6, 16, 8, dtype=torch.float64),
        "d_final_states must be torch.float32, got torch.float64",
    ),
    "dx": (zeros(2, 12, 6), "dx must be (b=2, l=12, h=6, p=16), got (2, 12, 6)"),
    "d_dt": (zeros(2, 12, 5), "d_dt must be (b=2, l=12, h=6), got (2, 12, 5)"),
    "dB": (zeros(2, 12, 6, 8), "dB must be (b=2, l=12, g=2, n=8), got (2, 12, 6, 8)"),
    "dC": (
        zeros(2, 12, 2, 8, dtype=torch.bfloat16),
        "dC must be torch.float32, got torch.bfloat16",
    ),
    "dz": (zeros(2, 12, 16, 6), "dz must be (b=2, l=12, h=6, p=16), got (2, 12, 16, 6)"),
}


@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_message_of_the_backward(name, device, ops):
    from common import op_arguments

    wrong, message = WRONG_GRADIENTS[name]
    inputs, (dy, d_final) = make_inputs(CASE, device), make_gradients(CASE, device)
    given = {"dy": dy, "d_final_states": d_final, name: wrong.to(device)}
    tensors, options = op_arguments(inputs)
    destinations = [given.get(k) for k in ("dx", "d_dt", "dB", "dC", "dz")]
    with pytest.raises(RuntimeError) as refused:
        ops.ssd_scan_backward_out(
            given["dy"], given["d_final_states"], *tensors, None, *options, 0, *destinations
        )
    assert str(refused.value) == f"ssd_scan_backward: {message}"


def test_memory_that_is_not_there_is_named(cuda):
    """An allocation that fails says how much was asked for."""
    x = torch.empty(1, 1, 1, 1, device=cuda).expand(1, 1 << 30, 4096, 256)
    small = torch.empty(1, 1, 1, 1, device=cuda)
    dt = torch.empty(1, 1, 1, device=cuda).expand(1, 1 << 30, 4096)
    A = torch.empty(4096, device=cuda)
    B = small.expand(1, 1 << 30, 1, 1)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        mamba2_cuda.ssd_scan(x, dt, A, B, B)
