"""ssd_scan as a citizen of PyTorch: opcheck, compile, autocast, checkpoint, second derivatives."""

from dataclasses import replace

import pytest
import torch
from cases import Case, make_gradients, make_inputs
from common import (
    RESULTS,
    gradients,
    leaves_of,
    op_arguments,
    present,
    run_ops,
    run_public,
    same_bits,
)
from torch.utils.checkpoint import checkpoint

import mamba2_cuda

ALL = Case(
    l=70, p=32, n=32, dtype=torch.bfloat16, D="hp", z=True, dt_bias=True, dt_limit=(0.05, 0.2),
    initial_states="working",
)  # fmt: skip
CASES = {
    "all": ALL,
    "few": Case(l=70, p=32, n=32, dtype=torch.bfloat16, d_final_states=False),
    "packed": replace(ALL, b=1, cu_seqlens=(0, 30, 30, 70)),
    "seq_idx": replace(ALL, seq_idx=True),
    "no tokens": replace(ALL, l=0),
    "fp64": replace(ALL, dtype=torch.float64),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, device, ops):
    """Schema, fake and real outputs agree; nothing that the schema does not say is written."""
    case = CASES[name]
    inputs, (dy, d_final) = make_inputs(case, device), make_gradients(case, device)
    tensors, options = op_arguments(inputs)
    check = torch.library.opcheck
    for save_states in (False, True):
        forward = (*tensors, *options, True, save_states, 0)
        check(ops.ssd_scan_forward.default, forward)
        kept = ops.ssd_scan_forward(*forward)[2]
        backward = (dy, d_final, *tensors, kept if kept.numel() else None, *options, 0)
        check(ops.ssd_scan_backward.default, backward)
    into = [
        torch.empty_like(inputs[k]) if k in inputs else None for k in ("x", "dt", "B", "C", "z")
    ]
    check(ops.ssd_scan_backward_out.default, (*backward, *into))


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, device):
    case = replace(CASES[name], b=min(CASES[name].b, 2), h=2, g=1, p=3, n=2, dtype=torch.float64)
    if case.l:
        cu = None if case.cu_seqlens is None else (1, 3, 3, 8)
        case = replace(case, l=9, cu_seqlens=cu)
    inputs = make_inputs(case, device)
    leaves = leaves_of(inputs)

    def scan(*values):
        arguments = {**inputs, **dict(zip(leaves, values))}
        return mamba2_cuda.ssd_scan(**arguments, return_final_states=True)

    assert torch.autograd.gradcheck(scan, list(leaves.values()), nondet_tol=0.0)


def compiled(**options):
    def scan(**arguments):
        # More than the operator, so that there is a graph around it.
        y, final_states = mamba2_cuda.ssd_scan(**{**arguments, "x": arguments["x"] * 2})
        return y * 2, final_states

    return torch.compile(scan, fullgraph=True, **options), scan


@pytest.mark.parametrize("name", ["all", "few", "packed"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(name, backend, device):
    if backend == "inductor" and name != "all":
        pytest.skip("one case shows the code generator; the graph is the same for all")
    case = replace(CASES[name], dtype=torch.float32)
    inputs, grads = make_inputs(case, device), make_gradients(case, device)
    fast, plain = compiled(backend=backend)
    got, expected = run_public(fast)(inputs, *grads), run_public(plain)(inputs, *grads)
    for key in expected:  # x * 2 and y * 2 are exact, so the rest is the operator's own
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_x_B_C_z_and_nothing_else(dtype, device):
    case = replace(ALL, dtype=torch.float32)
    inputs = make_inputs(case, device)
    dy, d_final = make_gradients(case, device)
    with torch.autocast(device, dtype):
        got = run_public(mamba2_cuda.ssd_scan)(inputs, dy.to(dtype), d_final)
    assert got["y"].dtype == dtype and got["final_states"].dtype == torch.float32
    assert all(got[name].dtype == torch.float32 for name in RESULTS[2:])
    cast = {**inputs, **{k: inputs[k].to(dtype) for k in ("x", "B", "C", "z")}}
    expected = run_public(mamba2_cuda.ssd_scan)(cast, dy.to(dtype), d_final)
    same_bits({k: v.to(got[k].dtype) for k, v in expected.items()}, got)


def test_checkpoint(device):
    inputs, grads = make_inputs(ALL, device), make_gradients(ALL, device)
    names = list(leaves_of(inputs))

    def scan(**arguments):
        def inner(*values):
            return mamba2_cuda.ssd_scan(**{**arguments, **dict(zip(names, values))})

        return checkpoint(inner, *(arguments[k] for k in names), use_reentrant=False)

    same_bits(run_public(scan)(inputs, *grads), run_public(mamba2_cuda.ssd_scan)(inputs, *grads))


def test_save_states_changes_no_result_but_speed(device):
    """Both ways are as exact (test_ssd_scan.py); here, that the argument is there and works."""
    inputs, grads = make_inputs(ALL, device), make_gradients(ALL, device)
    kept = run_public(mamba2_cuda.ssd_scan)(inputs, *grads, save_states=True)
    for name, expected in run_public(mamba2_cuda.ssd_scan)(inputs, *grads).items():
        torch.testing.assert_close(kept[name], expected, rtol=0.05, atol=0.05, msg=name)


@pytest.mark.parametrize("first", ["x", "A", "dt"])
def test_second_derivative_is_refused(first, device):
    inputs = make_inputs(replace(ALL, dtype=torch.float32), device)
    leaves = leaves_of(inputs)
    y = mamba2_cuda.ssd_scan(**{**inputs, **leaves})
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[first], create_graph=True)
    with pytest.raises(RuntimeError, match="ssd_scan: a second differentiation"):
        grad.sum().backward()


def test_only_the_gradients_asked_for(device):
    """Each argument alone has the gradient that it has among all."""
    inputs, (dy, d_final) = make_inputs(ALL, device), make_gradients(ALL, device)
    expected = run_public(mamba2_cuda.ssd_scan)(inputs, dy, d_final)
    for name in leaves_of(inputs):
        leaf = inputs[name].detach().requires_grad_()
        y, final_states = mamba2_cuda.ssd_scan(**{**inputs, name: leaf}, return_final_states=True)
        ((of, got),) = gradients({name: leaf}, y, final_states, dy, d_final).items()
        assert torch.equal(got, expected[of]), of


def test_gradient_through_final_states_alone(device):
    inputs, (dy, d_final) = make_inputs(ALL, device), make_gradients(ALL, device)
    leaves = leaves_of(inputs)
    _, final_states = mamba2_cuda.ssd_scan(**{**inputs, **leaves}, return_final_states=True)
    got = torch.autograd.grad(final_states, [leaves["x"], leaves["A"]], d_final)
    expected = run_public(mamba2_cuda.ssd_scan)(inputs, torch.zeros_like(dy), d_final)
    assert torch.equal(got[0], expected["dx"]) and torch.equal(got[1], expected["dA"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset", [0, 1])
def test_gradients_into_slices_of_one_projection(dtype, offset, device, ops):
    """dz, dx, dB, dC and d_dt land where the caller says and nothing beside them is touched."""
    inputs, (dy, d_final) = (
        make_inputs(replace(ALL, dtype=dtype), device),
        make_gradients(replace(ALL, dtype=dtype), device),
    )
    expected = run_ops(ops)(inputs, dy, d_final)
    widths = {k: inputs[k][0, 0].numel() for k in ("z", "x", "B", "C", "dt")}
    pad = 16
    projection = torch.full(
        (2, 70, sum(widths.values()) + 6 * pad), -7.0, dtype=dtype, device=device
    )
    into, begin, untouched = {}, pad + offset, torch.ones_like(projection, dtype=torch.bool)
    for name, width in widths.items():
        columns = slice(begin, begin + width)
        into[name] = projection[:, :, columns].unflatten(2, inputs[name].shape[2:])
        untouched[:, :, columns] = False
        begin += width + pad
    tensors, options = op_arguments(inputs)
    destinations = [into[k] for k in ("x", "dt", "B", "C", "z")]
    rest = ops.ssd_scan_backward_out(dy, d_final, *tensors, None, *options, 0, *destinations)
    got = dict(zip(RESULTS[2:], rest))
    for name, of in (("dx", "x"), ("d_dt", "dt"), ("dB", "B"), ("dC", "C"), ("dz", "z")):
        assert got[name].numel() == 0, f"{name} came back and was written"
        assert torch.equal(into[of], expected[name]), name
    assert (projection[untouched] == -7).all()
    for name in ("dA", "dD", "d_dt_bias", "d_initial_states"):
        assert torch.equal(got[name], expected[name]), name


def test_some_destinations(device, ops):
    inputs, (dy, d_final) = make_inputs(ALL, device), make_gradients(ALL, device)
    expected = run_ops(ops)(inputs, dy, d_final)
    tensors, options = op_arguments(inputs)
    dB = torch.empty_like(inputs["B"])
    results = ops.ssd_scan_backward_out(
        dy, d_final, *tensors, None, *options, 0, None, None, dB, None, None
    )
    got = dict(zip(RESULTS[2:], results)) | {"dB": dB}
    same_bits(present({"y": dy, **got}, inputs), {"y": dy, **{k: expected[k] for k in got}})
