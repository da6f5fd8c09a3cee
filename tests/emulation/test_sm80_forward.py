"""The forward of tier sm80 on the emulated card: y and final_states against fp64."""

import math

import pytest
import torch
from cases import FACTORS, Case, case_of, make_gradients, make_inputs, pairwise
from common import compare, op_arguments, same_bits, truth_of, yardstick_error

SM80 = 2  # csrc/ssd/plan.h: forces tier sm80

# Chunks are of 128 tokens, tiles of p 32, 64 and 80, slices of n 64.
SMALL = FACTORS | {
    "dtype": (torch.bfloat16, torch.float16),
    "p": (16, 32, 64, 80, 96),
    "n": (16, 64, 80, 128),
    "l": (1, 64, 129, 300),
    "h": (3, 6),
}


@pytest.fixture
def run(emulated):
    def forward(inputs, save_states=False):
        tensors, options = op_arguments(inputs)
        y, final_states, states = emulated.ops.ssd_scan_forward(
            *tensors, *options, True, save_states, SM80
        )
        return {"y": y, "final_states": final_states, "states": states}

    return forward


def check_forward(run, inputs, dy, what=""):
    results = run(inputs)
    outputs = {k: results[k] for k in ("y", "final_states")}
    expected = truth_of(inputs, dy, None)
    errors = yardstick_error(inputs, dy, None, expected)
    compare(outputs, {k: expected[k] for k in outputs}, errors, inputs, what)
    return outputs


def check_case(run, case):
    return check_forward(run, make_inputs(case), make_gradients(case)[0], str(case))


CASES = [case_of(row, seed) for seed, row in enumerate(pairwise(SMALL))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pairwise(run, case, nan_filled):
    check_case(run, case)


@pytest.mark.parametrize("timing", ["early", "late"])
def test_bits_do_not_depend_on_the_schedule(emulated, run, timing):
    case = Case(b=1, l=300, h=6, g=1, p=64, n=128, dtype=torch.bfloat16, D="h", dt_bias=True)
    emulated.schedule(seed=3, timing=timing, blocks=6)
    first = check_case(run, case)
    emulated.schedule(seed=4)
    same_bits(first, run(make_inputs(case)))


@pytest.mark.parametrize("p, n", [(256, 16), (16, 256), (128, 128)])
def test_large_dims(run, p, n):
    check_case(run, Case(b=1, l=130, h=1, g=1, p=p, n=n, dtype=torch.bfloat16, D="hp", z=True))


def test_heads_share_scores_on_a_small_card(emulated, run):
    """Many items a block, several chunks a row: the card of one SM has the fewest blocks."""
    case = Case(b=1, l=260, h=20, g=2, p=32, n=64, dtype=torch.bfloat16, D="h")
    inputs = make_inputs(case)
    emulated.schedule(sms=1)
    first = check_case(run, case)
    emulated.schedule(sms=1000)
    same_bits(first, run(inputs), "the plan changes no bit")


@pytest.mark.parametrize(
    "A, dt",
    [(-1e4, 100.0), (0.0, 0.3), (-1.0, 0.0), (-1e-3, 100.0), (-50.0, 1.0)],
)
def test_extremes(run, A, dt):
    """Decay of nothing and of everything, and a step of zero, among ordinary tokens."""
    case = Case(b=1, l=200, h=2, g=1, p=16, n=16, dtype=torch.bfloat16, dt_softplus=False)
    inputs = make_inputs(case)
    inputs["dt"][:, ::3] = dt
    inputs["A"][0] = A
    check_forward(run, inputs, make_gradients(case)[0])


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_packed_sequences_do_not_meet(run, cu_dtype, nan_filled):
    """NaN before, between (an unread sequence's tokens) and after: no other sequence sees it."""
    bounds = (4, 4, 150, 155, 300, 300)
    case = Case(b=1, l=310, p=16, n=16, dtype=torch.bfloat16, z=True, D="h", cu_seqlens=bounds)
    inputs = make_inputs(case)
    inputs["cu_seqlens"] = inputs["cu_seqlens"].to(cu_dtype)
    clean = check_forward(run, inputs, make_gradients(case)[0])
    for name in ("x", "B", "C", "dt", "z"):
        for alien in (slice(0, 4), slice(150, 155), slice(300, 310)):
            inputs[name][:, alien] = math.nan
    dirty = run(inputs)
    kept = [t for begin, end in ((4, 150), (155, 300)) for t in range(begin, end)]
    assert torch.equal(dirty["y"][:, kept], clean["y"][:, kept])
    assert (dirty["y"][:, :4] == 0).all() and (dirty["y"][:, 300:] == 0).all()
    others = [0, 1, 3, 4]
    assert torch.equal(dirty["final_states"][others], clean["final_states"][others])


def test_offsets_are_clamped_and_made_monotone(run):
    case = Case(b=1, l=150, p=16, n=16, dtype=torch.bfloat16, cu_seqlens=(-3, 60, 40, 400))
    right = make_inputs(case) | {"cu_seqlens": torch.tensor([0, 60, 60, 150], dtype=torch.int32)}
    same_bits(run(make_inputs(case)), run(right))


def test_a_packed_sequence_is_as_if_alone(run):
    case = Case(b=1, l=300, p=32, n=64, dtype=torch.bfloat16, cu_seqlens=(0, 37, 300))
    inputs = make_inputs(case)
    packed = run(inputs)
    alone = {
        k: v[:, 37:300] if torch.is_tensor(v) and v.dim() >= 3 else v for k, v in inputs.items()
    }
    alone["cu_seqlens"] = None
    single = run(alone)
    assert torch.equal(packed["y"][:, 37:], single["y"])
    assert torch.equal(packed["final_states"][1:], single["final_states"])


def test_segment_state(emulated, run):
    """The state a segment leaves behind is the scan's final state, bit for bit."""
    case = Case(b=2, l=200, p=32, n=64, dtype=torch.bfloat16, dt_bias=True)
    inputs = make_inputs(case)
    x, dt, A, B, bias = (inputs[k] for k in ("x", "dt", "A", "B", "dt_bias"))
    limits = inputs["dt_limit"]
    state, log_decay = emulated.ops.ssd_segment_state_forward(
        x, dt, A, B, bias, True, *limits, SM80
    )
    assert torch.equal(state, run(inputs)["final_states"])
    delta = torch.nn.functional.softplus(dt.double() + bias.double())
    torch.testing.assert_close(log_decay.double(), (delta * A).sum(1), rtol=1e-5, atol=0)


def test_a_sequence_is_cut_unless_batch_invariant(emulated):
    """From the third segment on a state is the sum of what segments add, in other bits."""
    case = Case(b=1, l=12400, h=1, g=1, p=16, n=16, dtype=torch.bfloat16, decay="weak")
    tensors, options = op_arguments(make_inputs(case))

    def final_states(sms, plan):
        emulated.schedule(sms=sms)
        return emulated.ops.ssd_scan_forward(*tensors, *options, True, False, plan)[1]

    invariant = final_states(1000, SM80 | 1 << 8)
    assert torch.equal(invariant, final_states(1, SM80 | 1 << 8))
    assert not torch.equal(invariant, final_states(1000, SM80))
