"""ssd_step's CUDA kernels on the emulated card: y and the state against fp64."""

from dataclasses import replace

import pytest
import torch
from cases import Case, make_inputs
from test_ssd_step import ALL, CASES, STATES, TOKENS, check, make_state

SMALL = {k: CASES[k] for k in ("all", "few", "one token", "odd", "fp64")} | {
    "bf16": Case(b=2, l=2, h=2, p=33, n=64, dtype=torch.bfloat16, D="h", z=True, dt_bias=True),
    "fp16, sliced": Case(b=1, l=3, h=4, p=8, n=128, dtype=torch.float16, sliced=True, z=True),
    "wide": Case(b=1, l=2, h=1, g=1, p=5, n=256, dtype=torch.bfloat16, D="hp"),
    "n 72": Case(b=1, l=2, h=2, p=3, n=72, dtype=torch.bfloat16, D="hp"),
    "whole": Case(b=2, l=2, h=4, g=2, p=64, n=128, dtype=torch.bfloat16, z=True, D="hp"),
    "more tasks than blocks": Case(b=2, l=1, h=560, g=1, p=3, n=8, dtype=torch.bfloat16, z=True),
}


@pytest.fixture
def step(emulated):
    def of(
        state, x, dt, A, B, C, *, D=None, z=None, dt_bias=None, dt_softplus, dt_limit, **indices
    ):
        slots = [indices.get(k) for k in ("state_indices", "out_state_indices")]
        options = (D, z, dt_bias, dt_softplus, *dt_limit, *slots)
        return emulated.ops.ssd_step(state, x, dt, A, B, C, *options, 0)

    return of


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("name", SMALL)
def test_values_and_state(step, name, state_dtype, nan_filled):
    case = SMALL[name]
    check(make_state(case, state_dtype, "cpu"), make_inputs(case), step)


@pytest.mark.parametrize("name", ["all", "odd", "bf16"])
def test_tokens_together_and_one_by_one(step, name):
    """The same bits, with a state that loses none between the calls."""
    inputs = make_inputs(SMALL[name])
    together = make_state(SMALL[name], torch.float32, "cpu")
    apart = together.clone()
    y = step(together, **inputs)
    for t in range(SMALL[name].l):
        token = {k: v[:, t] if k in TOKENS else v for k, v in inputs.items()}
        assert torch.equal(step(apart, **token), y[:, t])
    assert torch.equal(apart, together)


@pytest.mark.parametrize("n", [16, 19])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_slots(step, n, elsewhere, nan_filled):
    case = replace(ALL, b=5, n=n, p=5, l=2, dtype=torch.bfloat16)
    slots = make_state(case, torch.float32, "cpu", slots=9)
    indices = {"state_indices": torch.tensor([3, -1, 0, 8, 9], dtype=torch.int32)}
    written = [3, 0, 8]
    if elsewhere:
        indices["out_state_indices"] = torch.tensor([4, 2, 0, -1, 5], dtype=torch.int32)
        written = [4, 0]
    slots[7] = torch.nan  # no index names it
    before, inputs = slots.clone(), make_inputs(case)
    y = step(slots, **inputs, **indices)
    assert not y[[1, 4]].any()
    for slot in range(9):
        same = torch.equal(slots[slot].nan_to_num(), before[slot].nan_to_num())
        assert same == (slot not in written), f"slot {slot}"
    kept = {k: v[[0, 2, 3]] if k in TOKENS else v for k, v in inputs.items()}
    alone = before[[3, 0, 8]]
    assert torch.equal(step(alone, **kept), y[[0, 2, 3]])
    targets = [4, 0] if elsewhere else [3, 0, 8]
    assert torch.equal(alone[: len(targets)], slots[targets])


def test_slots_apart_in_a_larger_cache(step):
    """Slots are strided: the caches of several layers in one tensor."""
    inputs = make_inputs(ALL)
    cache = make_state(ALL, torch.float32, "cpu").repeat(2, 1, 1, 1, 1).transpose(0, 1).contiguous()
    alone = cache[:, 1].clone()
    y = step(cache[:, 1], **inputs)
    assert torch.equal(y, step(alone, **inputs))
    assert torch.equal(cache[:, 1], alone) and not torch.equal(cache[:, 0], alone)
