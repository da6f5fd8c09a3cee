"""ssd_segment_state: values and gradients against fp64; segments compose to ssd_scan."""

from dataclasses import replace

import pytest
import torch
from cases import Case, make_inputs
from common import HALF, compare, leaves_of, plans, to_double, to_dtype

import mamba2_cuda
from mamba2_cuda import reference
from mamba2_cuda.reference.yardstick import yardstick

pytestmark = pytest.mark.usefixtures("nan_filled")
BIASED = Case(l=130, dt_bias=True, dt_limit=(0.05, 0.2))
CASES = {
    "biased": BIASED,
    "plain": Case(dt_softplus=False),
    "bf16": replace(BIASED, dtype=torch.bfloat16, p=64, n=128, dt_dtype=torch.float32),
    "fp16, sliced": replace(BIASED, dtype=torch.float16, p=80, n=64, sliced=True),
    "n 256": replace(BIASED, dtype=torch.bfloat16, p=64, n=256),
    "fp64": replace(BIASED, dtype=torch.float64, p=5, n=19),
    "long": Case(b=1, l=2049, h=3, g=1, dtype=torch.bfloat16, p=32, n=64, decay="weak"),
    "strong": replace(BIASED, dtype=torch.bfloat16, p=64, n=64, decay="strong"),
    "no tokens": Case(l=0, dt_bias=True),
}


def segment_inputs(case, device):
    """The arguments, and gradients of state and log_decay."""
    inputs = make_inputs(case, device)
    del inputs["C"]
    random_ = torch.Generator().manual_seed(case.seed + 1)
    shapes = ((case.b, case.h, case.p, case.n), (case.b, case.h))
    grads = (torch.randn(s, dtype=torch.float64, generator=random_) for s in shapes)
    return inputs, [d.to(device, case.working) for d in grads]


def under_autograd(function, inputs, grads):
    leaves = leaves_of(inputs)
    outputs = function(**{**inputs, **leaves})
    outputs_ = [v for v in outputs if v.requires_grad]  # the reference has none with no token
    d = [torch.zeros_like(v) for v in leaves.values()]
    if outputs_:
        given = grads[-len(outputs_) :]
        arguments = list(leaves.values())
        d = torch.autograd.grad(outputs_, arguments, given, materialize_grads=True)
    names = {"x": "dx", "dt": "d_dt", "A": "dA", "B": "dB", "dt_bias": "d_dt_bias"}
    results = dict(zip(("state", "log_decay"), outputs)) | {names[k]: v for k, v in zip(leaves, d)}
    return {k: v.detach() for k, v in results.items()}


def rounded(inputs, grads, **how):
    """The yardstick's results: a segment is a scan whose y nobody reads."""
    silent = {**inputs, "C": torch.zeros_like(inputs["B"])}
    results = yardstick(silent, torch.zeros_like(inputs["x"]), *grads, **how)
    results["state"] = results.pop("final_states")
    return results


def run_ops(ops, plan):
    def run(inputs, grads):
        tensors = [inputs[k] for k in ("x", "dt", "A", "B")] + [inputs.get("dt_bias")]
        options = (inputs["dt_softplus"], *inputs["dt_limit"], plan)
        outputs = ops.ssd_segment_state_forward(*tensors, *options)
        d = ops.ssd_segment_state_backward(*grads, *tensors, *options)
        names = ("state", "log_decay", "dx", "d_dt", "dA", "dB", "d_dt_bias")
        results = dict(zip(names, (*outputs, *d)))
        if "dt_bias" not in inputs:
            assert results.pop("d_dt_bias").numel() == 0
        return results

    return run


def check(run, case, device, what="", **changed):
    inputs, grads = segment_inputs(case, device)
    for name, value in changed.items():
        inputs[name].fill_(value)
    double = {k: to_double(v) for k, v in inputs.items()}
    expected = under_autograd(reference.ssd_segment_state, double, [to_double(d) for d in grads])
    wide = {k: to_dtype(v, case.working) for k, v in inputs.items()}
    yard = [
        rounded(inputs, grads, operand=case.dtype if case.dtype in HALF else None),
        rounded(wide, grads, working=case.working, chunk=16),
    ]
    yard[0]["log_decay"] = expected["log_decay"]
    yard[1]["log_decay"] = reference.ssd_segment_state(**wide)[1]
    errors = {k: [y[k].double() - v for y in yard] for k, v in expected.items()}
    results = run(inputs, grads)
    compare(results, expected, errors, inputs, f"{case} {what}")
    again = run(inputs, grads)
    assert all(torch.equal(results[k], again[k]) for k in results)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, device, ops):
    for plan in plans(device, CASES[name].dtype):
        check(run_ops(ops, plan), CASES[name], device, f"plan={plan}")


@pytest.mark.parametrize("name", CASES)
def test_public(name, device):
    def run(inputs, grads):
        return under_autograd(mamba2_cuda.ssd_segment_state, inputs, grads)

    check(run, CASES[name], device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_steep_decay(dtype, device, ops):
    """log_decay and its gradient are exact also where a token's decay is 0 in fp32."""
    case = replace(BIASED, dtype=dtype, dt_dtype=torch.float32, p=32, n=32)
    for plan in plans(device, dtype):
        check(run_ops(ops, plan), case, device, f"plan={plan}", A=-1e4)


def test_gradcheck(device):
    inputs, _ = segment_inputs(replace(CASES["fp64"], b=1, l=7, h=2, p=3, n=2), device)
    leaves = leaves_of(inputs)

    def segment(*values):
        return mamba2_cuda.ssd_segment_state(**{**inputs, **dict(zip(leaves, values))})

    assert torch.autograd.gradcheck(segment, list(leaves.values()))


def test_segments_compose(device):
    """exp(log_decay) S + state, segment after segment, is the scan's final state."""
    inputs = make_inputs(replace(CASES["fp64"], initial_states="working"), device)
    _, final = mamba2_cuda.ssd_scan(**inputs, return_final_states=True)
    options = {k: inputs[k] for k in ("A", "dt_bias", "dt_softplus", "dt_limit")}
    S = inputs["initial_states"]
    for begin, end in ((0, 1), (1, 70), (70, 70), (70, 130)):
        segment = {k: inputs[k][:, begin:end] for k in ("x", "dt", "B")}
        state, log_decay = mamba2_cuda.ssd_segment_state(**segment, **options)
        S = log_decay.exp()[..., None, None] * S + state
    torch.testing.assert_close(S, final, rtol=1e-12, atol=1e-12)


def test_opcheck(device, ops):
    inputs, grads = segment_inputs(BIASED, device)
    tensors = [inputs[k] for k in ("x", "dt", "A", "B", "dt_bias")]
    options = (True, 0.05, 0.2, 0)
    torch.library.opcheck(ops.ssd_segment_state_forward.default, (*tensors, *options))
    torch.library.opcheck(ops.ssd_segment_state_backward.default, (*grads, *tensors, *options))


def test_message(device):
    inputs, _ = segment_inputs(BIASED, device)
    inputs["dt"] = inputs["dt"][:, 1:]
    wrong = r"ssd_segment_state: dt must be \(b=2, l=130, h=6\), got \(2, 129, 6\)"
    with pytest.raises(RuntimeError, match=wrong):
        mamba2_cuda.ssd_segment_state(**inputs)
