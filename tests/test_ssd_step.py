"""ssd_step: the scan, token by token, for every option, state dtype and slot."""

from dataclasses import replace

import pytest
import torch
from cases import Case, make_inputs
from common import compare, to_dtype

import mamba2_cuda
import mamba2_cuda.ops
from mamba2_cuda import reference
from mamba2_cuda.reference.discretise import working_dtype

pytestmark = pytest.mark.skipif(
    not hasattr(mamba2_cuda.ops, "ssd_step"), reason="this build has no ssd_step"
)
ALL = Case(b=3, l=4, p=16, n=16, D="hp", z=True, dt_bias=True, dt_limit=(0.05, 0.2))
CASES = {
    "all": ALL,
    "few": Case(b=3, l=4, dt_softplus=False),
    "one token": replace(ALL, l=1),
    "bf16": replace(ALL, dtype=torch.bfloat16, p=64, n=128, D="h", dt_dtype=torch.float32),
    "fp16, sliced": replace(ALL, dtype=torch.float16, p=80, n=64, sliced=True),
    "wide": replace(ALL, dtype=torch.bfloat16, p=128, n=256, g=1),
    "odd": replace(ALL, p=5, n=19, h=3, g=3),
    "fp64": replace(ALL, dtype=torch.float64, p=5, n=3),
}
STATES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TOKENS = ("x", "dt", "B", "C", "z")


def make_state(case, dtype, device, slots=None):
    random_ = torch.Generator().manual_seed(7)
    shape = (slots or case.b, case.h, case.p, case.n)
    return torch.randn(shape, dtype=torch.float64, generator=random_).to(dtype).to(device)


def check(state, inputs, step=None, **indices):
    """One call of mamba2_cuda.ssd_step, or of another with its interface, against the reference.

    What it may err by: what the reference does in fp32 (the arithmetic), and what rounding y and
    the new state to their dtypes does.
    """
    names, working = ("y", "final_states"), working_dtype(inputs["x"])

    def stepped(dtype):
        wide = {k: to_dtype(v, dtype) for k, v in inputs.items()}
        return dict(zip(names, reference.ssd_step(state.to(dtype), **wide, **indices)))

    expected, arithmetic = stepped(torch.float64), stepped(working)
    dtypes = {"y": inputs["x"].dtype, "final_states": state.dtype}
    rounded = {k: v.to(dtypes[k]) for k, v in expected.items()}
    errors = {k: [u[k].double() - v for u in (rounded, arithmetic)] for k, v in expected.items()}
    y = (step or mamba2_cuda.ssd_step)(state, **inputs, **indices)
    results = {"y": y, "final_states": state}
    source = indices.get("state_indices")
    if source is not None:  # what a padding entry's y holds is nobody's business
        for of in (expected, results):
            of["y"] = of["y"][source >= 0]
        errors["y"] = [v[source >= 0] for v in errors["y"]]
    compare(results, expected, errors, inputs)


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("name", CASES)
def test_values_and_state(name, state_dtype, device):
    case = CASES[name]
    check(make_state(case, state_dtype, device), make_inputs(case, device))


@pytest.mark.parametrize("name", ["all", "few", "fp64"])
def test_without_a_token_dimension(name, device):
    case = replace(CASES[name], l=1)
    inputs, state = make_inputs(case, device), make_state(case, case.working, device)
    single = {k: v[:, 0] if k in TOKENS else v for k, v in inputs.items()}
    one, many = state.clone(), state.clone()
    y = mamba2_cuda.ssd_step(one, **single)
    assert torch.equal(y[:, None], mamba2_cuda.ssd_step(many, **inputs))
    assert torch.equal(one, many)


@pytest.mark.parametrize("name", ["all", "few", "fp64", "odd"])
def test_steps_are_the_scan(name, device):
    """Seven tokens, as 1 + 4 + 2, from the state that ssd_scan leaves after the first five."""
    case = replace(CASES[name], l=12)
    inputs = make_inputs(case, device)
    expected, final = mamba2_cuda.ssd_scan(**inputs, return_final_states=True)
    prompt = {k: v[:, :5] if k in TOKENS else v for k, v in inputs.items()}
    _, state = mamba2_cuda.ssd_scan(**prompt, return_final_states=True)
    for begin, end in ((5, 6), (6, 10), (10, 12)):
        tokens = {k: v[:, begin:end] if k in TOKENS else v for k, v in inputs.items()}
        y = mamba2_cuda.ssd_step(state, **tokens)
        torch.testing.assert_close(y, expected[:, begin:end])
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_slots(state_dtype, elsewhere, device):
    """States are found, and left, where the indices say; padding touches nothing."""
    case = replace(ALL, b=5)
    slots = make_state(case, state_dtype, device, slots=9)
    slots[7] = torch.nan  # no index names it
    indices = {"state_indices": torch.tensor([3, -1, 0, 8, -1], dtype=torch.int32, device=device)}
    if elsewhere:
        out = torch.tensor([4, 2, 0, 6, -1], dtype=torch.int32, device=device)
        indices["out_state_indices"] = out
    before = slots.clone()
    check_slots = slots.nan_to_num()
    check(check_slots, make_inputs(case, device), **indices)
    mamba2_cuda.ssd_step(slots, **make_inputs(case, device), **indices)
    written = [4, 0, 6] if elsewhere else [3, 0, 8]
    for slot in range(9):
        same = torch.equal(slots[slot].nan_to_num(), before[slot].nan_to_num())
        assert same == (slot not in written), f"slot {slot}"


def test_opcheck(device, ops):
    inputs = make_inputs(ALL, device)
    tensors = [inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    arguments = (make_state(ALL, torch.float32, device), *tensors, True, 0.05, 0.2, None, None, 0)
    torch.library.opcheck(ops.ssd_step.default, arguments)


@pytest.mark.gpu
def test_graph_capture(cuda):
    """One step, captured, replayed from state to state."""
    case = replace(CASES["bf16"], l=1)
    inputs, state = make_inputs(case, cuda), make_state(case, torch.float32, cuda)
    expected = state.clone()
    for _ in range(3):
        y_expected = mamba2_cuda.ssd_step(expected, **inputs)
    mamba2_cuda.ssd_step(state.clone(), **inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mamba2_cuda.ssd_step(state, **inputs)
    for _ in range(3):
        graph.replay()
    assert torch.equal(state, expected) and torch.equal(y, y_expected)


WRONG = {
    "state of another n": (
        {"state": torch.zeros(3, 6, 16, 15)},
        r"state must be \(.*h=6, p=16, n=16\), got \(3, 6, 16, 15\)",
    ),
    "state is int": ({"state": torch.zeros(3, 6, 16, 16, dtype=torch.int32)}, "state must be "),
    "dt per token": ({"dt": torch.zeros(3, 6)}, r"dt must be \(b=3, .*=4, h=6\), got \(3, 6\)"),
    "indices of another b": (
        {"state_indices": torch.zeros(2, dtype=torch.int32)},
        r"state_indices must be \(b=3,\), got \(2,\)",
    ),
    "indices are int64": (
        {"state_indices": torch.zeros(3, dtype=torch.int64)},
        "state_indices must be torch.int32, got torch.int64",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_message(name, device):
    wrong, message = WRONG[name]
    arguments = {"state": make_state(ALL, torch.float32, "cpu"), **make_inputs(ALL), **wrong}
    arguments = {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=f"ssd_step: {message}"):
        mamba2_cuda.ssd_step(**arguments)
