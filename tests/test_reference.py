"""The three forms of the reference agree, in values and gradients, with all arguments."""

import random

import pytest
import torch
from cases import Case, make_gradients, make_inputs, packed
from common import detached, leaves_of, run_public, truth_of

from mamba2_cuda import reference
from mamba2_cuda.reference.yardstick import yardstick

F64 = torch.float64
ALL = Case(
    b=2, l=37, h=6, p=5, g=2, n=3, dtype=F64, D="hp", z=True, dt_bias=True, dt_limit=(0.05, 0.2),
    initial_states="working",
)  # fmt: skip
CASES = {
    "plain": Case(b=2, l=37, h=3, p=5, g=1, n=3, dtype=F64, dt_softplus=False),
    "all": ALL,
    "strong": Case(b=1, l=70, h=3, p=5, g=3, n=2, dtype=F64, D="h", decay="strong"),
    "seq_idx": Case(**{**vars(ALL), "seq_idx": True}),
    "packed": packed(ALL, random.Random(1)),
    "no tokens": Case(b=2, l=0, h=3, p=5, g=1, n=3, dtype=F64, initial_states="working"),
    "no sequences": Case(b=1, l=5, h=3, p=5, g=1, n=3, dtype=F64, D="h", cu_seqlens=(2,)),
    "long": Case(b=1, l=2049, h=3, p=5, g=1, n=4, dtype=F64),
}


def close(got, expected, what):
    for name, true in expected.items():
        error = (got[name] - true).norm() / max(true.norm(), 1e-300)
        assert error < 1e-12, f"{what}: {name} {error:.1e}"


def in_form(form):
    return run_public(lambda **arguments: reference.ssd_scan(**arguments, form=form))


@pytest.mark.parametrize("name", CASES)
def test_forms_agree(name):
    inputs, grads = make_inputs(CASES[name]), make_gradients(CASES[name])
    expected = detached(in_form("recurrent")(inputs, *grads))
    for form in ("quadratic", "block"):
        if name != "long" or form == "block":
            close(in_form(form)(inputs, *grads), expected, form)


@pytest.mark.parametrize("chunk", [1, 8, 64])
@pytest.mark.parametrize("name", CASES)
def test_yardstick_without_rounding_is_exact(name, chunk):
    """The hand-written backward is the derivative of the forward."""
    if name == "long" and chunk == 1:
        pytest.skip("2049 chunks of one token add nothing to 37 of them")
    inputs, (dy, d_final) = make_inputs(CASES[name]), make_gradients(CASES[name])
    close(yardstick(inputs, dy, d_final, chunk=chunk), truth_of(inputs, dy, d_final), "yardstick")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_yardstick_errs_like_16_bits(dtype):
    """Each result errs by about one rounding to 16 bits, and not by none."""
    case = Case(**{**vars(CASES["all"]), "dtype": dtype, "l": 200, "p": 16, "n": 16})
    inputs, (dy, d_final) = make_inputs(case), make_gradients(case)
    expected, unit = truth_of(inputs, dy, d_final), torch.finfo(dtype).eps / 2
    for name, got in yardstick(inputs, dy, d_final, operand=dtype).items():
        error = (got.double() - expected[name]).norm() / expected[name].norm()
        assert 0.02 * unit < error < 4 * unit, f"{name}: {error / unit:.2f} roundings"


def test_gradcheck():
    inputs = make_inputs(Case(**{**vars(ALL), "b": 1, "l": 6, "h": 2, "p": 2, "n": 2}))
    leaves = leaves_of(inputs)

    def scan(*values):
        arguments = {**inputs, **dict(zip(leaves, values))}
        return reference.ssd_scan(**arguments, return_final_states=True)

    assert torch.autograd.gradcheck(scan, list(leaves.values()))


def test_packed_sequences_do_not_meet():
    """Each sequence as it would be alone, and NaN between them leaks nowhere."""
    case = Case(**{**vars(CASES["packed"]), "cu_seqlens": (3, 9, 9, 30)})
    inputs = make_inputs(case)
    inputs["x"] = inputs["x"].clone()
    inputs["x"][:, :3] = inputs["x"][:, 30:] = torch.nan
    y, final = reference.ssd_scan(**inputs, return_final_states=True)
    for i, (begin, end) in enumerate([(3, 9), (9, 9), (9, 30)]):
        alone = {k: inputs[k][:, begin:end] for k in ("x", "dt", "B", "C", "z")}
        alone |= {"cu_seqlens": None, "initial_states": inputs["initial_states"][i : i + 1]}
        y_i, final_i = reference.ssd_scan(**{**inputs, **alone}, return_final_states=True)
        torch.testing.assert_close(y[:, begin:end], y_i)
        torch.testing.assert_close(final[i : i + 1], final_i)
    assert (y[:, :3] == 0).all() and (y[:, 30:] == 0).all()


def test_segments_compose():
    """A state passes a segment as exp(log_decay) S + state."""
    inputs = make_inputs(CASES["all"])
    _, final = reference.ssd_scan(**inputs, return_final_states=True)
    options = {k: inputs[k] for k in ("A", "dt_bias", "dt_softplus", "dt_limit")}
    S = inputs["initial_states"]
    for begin, end in ((0, 10), (10, 10), (10, 37)):
        segment = {k: inputs[k][:, begin:end] for k in ("x", "dt", "B")}
        state, log_decay = reference.ssd_segment_state(**segment, **options)
        S = log_decay.exp()[..., None, None] * S + state
    torch.testing.assert_close(S, final)


def test_steps_are_the_scan():
    inputs = make_inputs(CASES["all"])
    y, final = reference.ssd_scan(**inputs, return_final_states=True)
    state = inputs.pop("initial_states")
    for begin, end in ((0, 1), (1, 2), (2, 37)):
        tokens = {k: inputs[k][:, begin:end] for k in ("x", "dt", "B", "C", "z")}
        if end - begin == 1:
            tokens = {k: v[:, 0] for k, v in tokens.items()}
        y_t, state = reference.ssd_step(state, **{**inputs, **tokens})
        torch.testing.assert_close(y_t.reshape(y[:, begin:end].shape), y[:, begin:end])
    torch.testing.assert_close(state, final)


def test_step_reads_and_writes_slots():
    inputs = make_inputs(Case(b=3, l=1, h=3, g=1, p=4, n=2, dtype=F64))
    slots = torch.randn(5, 3, 4, 2, dtype=F64)
    read, write = torch.tensor([4, -1, 0]), torch.tensor([4, 2, 1])
    y, after = reference.ssd_step(slots, **inputs, state_indices=read, out_state_indices=write)
    _, expected = reference.ssd_step(slots[[4, 4, 0]], **inputs)
    assert torch.equal(after[4], expected[0]) and torch.equal(after[1], expected[2])
    assert torch.equal(after[[0, 2, 3]], slots[[0, 2, 3]]) and (y[1] == 0).all()
