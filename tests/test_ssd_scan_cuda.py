"""ssd_scan where only a GPU can show it: graphs, streams, a second device, 2^31 elements."""

from dataclasses import replace

import pytest
import torch
from cases import Case, make_gradients, make_inputs
from common import (
    check,
    gradients,
    leaves_of,
    op_arguments,
    plans,
    run_ops,
    run_public,
    same_bits,
)

import mamba2_cuda

pytestmark = pytest.mark.gpu
ALL = Case(
    l=500, p=64, n=128, dtype=torch.bfloat16, D="hp", z=True, dt_bias=True, initial_states="working"
)
PACKED = replace(ALL, b=1, cu_seqlens=(0, 100, 100, 333, 490))


WIDE = replace(PACKED, p=128, n=256)  # heads in parts, states in passes


@pytest.mark.parametrize("case", [ALL, PACKED, WIDE, replace(ALL, b=1, l=9000)], ids=str)
def test_graph_capture(case, cuda):
    """A captured forward and backward, replayed on new values, packed bounds included."""
    inputs, (dy, d_final) = make_inputs(case, cuda), make_gradients(case, cuda)
    static = leaves_of(inputs)
    arguments = {**inputs, **static}
    run = run_public(mamba2_cuda.ssd_scan)

    def step():
        y, final_states = mamba2_cuda.ssd_scan(**arguments, return_final_states=True)
        grads = gradients(static, y, final_states, dy, d_final)
        return {"y": y, "final_states": final_states} | grads

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in (10, 11):
        new = make_inputs(replace(case, seed=seed), cuda)
        if case.cu_seqlens is not None:
            new["cu_seqlens"] = torch.tensor((5, 6, 200, 201, 500), dtype=torch.int32, device=cuda)
            inputs["cu_seqlens"].copy_(new["cu_seqlens"])
        with torch.no_grad():
            for name, v in static.items():
                v.copy_(new[name])
        graph.replay()
        expected = run(new, dy, d_final)
        same_bits(results, expected, f"seed {seed}")


def test_no_synchronisation(cuda):
    inputs, grads = make_inputs(PACKED, cuda), make_gradients(PACKED, cuda)
    run = run_public(mamba2_cuda.ssd_scan)
    run(inputs, *grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, *grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_side_stream(cuda):
    """Work is put on the current stream: after what was put there before, and nowhere else."""
    inputs, grads = make_inputs(ALL, cuda), make_gradients(ALL, cuda)
    run = run_public(mamba2_cuda.ssd_scan)
    expected = run(inputs, *grads)
    late = {k: torch.zeros_like(v) if k in ("x", "B") else v for k, v in inputs.items()}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # about 50 ms, in which anything out of order reads zeros
        for name in ("x", "B"):
            late[name].copy_(inputs[name])
        got = run(late, *grads)
    side.synchronize()
    same_bits(got, expected)


def test_two_streams_at_once(cuda):
    """Two calls that overlap share no scratch memory."""
    cases = [replace(ALL, b=1, l=8000, seed=seed) for seed in (0, 1)]
    problems = [(make_inputs(c, cuda), make_gradients(c, cuda)) for c in cases]
    run = run_public(mamba2_cuda.ssd_scan)
    expected = [run(inputs, *grads) for inputs, grads in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    got = [[], []]
    for _ in range(5):
        for i, (stream, (inputs, grads)) in enumerate(zip(streams, problems)):
            with torch.cuda.stream(stream):
                got[i].append(run(inputs, *grads))
    torch.cuda.synchronize()
    for i in (0, 1):
        for results in got[i]:
            same_bits(results, expected[i])


def test_second_device(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device on this machine")
    with torch.cuda.device(0):  # the tensors', not the current device, is where it runs
        check(run_public(mamba2_cuda.ssd_scan), ALL, "cuda:1")


def test_more_than_2_31_elements(cuda, ops):
    """The last rows of x lie beyond 2^31 elements: they give what they give alone."""
    l, h, p, n = 2**18 + 65, 64, 64, 16
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    torch.manual_seed(0)
    shape = {"x": (2, l, h, p), "B": (2, l, 1, n), "C": (2, l, 1, n), "dt": (2, l, h)}
    inputs = {k: torch.randn(v, device=cuda, dtype=torch.bfloat16) for k, v in shape.items()}
    inputs |= {"A": -torch.rand(h, device=cuda), "dt_softplus": True, "dt_limit": (0.0, 1.0)}
    dy = torch.randn(shape["x"], device=cuda, dtype=torch.bfloat16)
    assert inputs["x"].numel() > 2**31
    last = {k: v[1:] if k in shape else v for k, v in inputs.items()}
    for plan in plans(cuda, torch.bfloat16):
        run = run_ops(ops, plan | 1 << 8)
        expected = run(last, dy[1:], None)
        got = run(inputs, dy, None)
        for name in ("y", "final_states", "dx", "d_dt", "dB", "dC"):
            assert torch.equal(got[name][1:], expected[name]), f"{name} plan={plan}"
        del got, expected


@pytest.mark.parametrize("z", [False, True])
def test_states_kept_where_they_fill_the_card(z, cuda, ops):
    """With so many heads the tensor-core tiers' forward keeps states for their backward."""
    case = replace(ALL, l=300, h=80, g=1, z=z, save_states=True)
    tensors, options = op_arguments(make_inputs(case, cuda))
    for plan in plans(cuda, case.dtype):
        kept = ops.ssd_scan_forward(*tensors, *options, False, True, plan)[2]
        if plan in (2, 3):
            assert kept.numel() == 2 * 3 * 80 * 64 * 128  # b, chunks of 128 tokens, h, p, n
        check(run_ops(ops, plan), case, cuda)


@pytest.mark.parametrize("b, l", [(1, 65536), (4, 16384)])
def test_long_sequences(b, l, cuda, ops):
    """Lengths at which plans cut sequences into segments."""
    case = Case(b=b, l=l, h=4, g=1, p=64, n=128, dtype=torch.bfloat16, D="h", dt_bias=True)
    for plan in plans(cuda, case.dtype):
        check(run_ops(ops, plan), case, cuda)
