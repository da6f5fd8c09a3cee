"""The kernels that explain() tells of, asked of the emulation's library, which has every tier."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from cases import Case
from common import check, run_ops

from bench.rows import load
from bench.shapes import SHAPES
from mamba2_cuda import _explain

RESULTS = Path(__file__).parents[2] / "bench" / "results" / "h200.json"
ANY, SM80, SM90 = 1, 2, 3  # csrc/ssd/plan.h
# Shared memory that a block of a card may have.
CARDS = {(8, 0, 108): 163, (8, 6, 84): 99, (8, 9, 142): 99, (9, 0, 132): 227, (12, 0, 170): 99}


@pytest.fixture
def ask(emulation_build, emulated):
    library = emulation_build.OUT / "emulated.so"

    def launches(b, l, h, p, g, n, *, dtype=torch.bfloat16, sequences=None, backward=False,
                 has_z=False, save_states=False, D_per_channel=False, card=(9, 0, 132),
                 plan=0):  # fmt: skip
        nseq, packed = (b, False) if sequences is None else (sequences, True)
        dtype = _explain.DTYPES.index(dtype)
        return _explain.launches(
            library, b, l, h, p, g, n, nseq, packed, dtype, backward, has_z, save_states,
            D_per_channel, *card, plan, False,
        )  # fmt: skip

    return launches


def stages(answer):
    return [kernel["stage"] for kernel in answer["kernels"]]


def test_stages_are_those_of_the_equation(ask):
    forward = ask(2, 300, 4, 64, 1, 128, plan=SM80)
    assert stages(forward) == ["chunk_cumsum", "chunk_state", "chunk_scan"]
    sweep = forward["kernels"][1]
    assert sweep["tile"] == {"tokens": 64, "p": 64, "n": 64} and sweep["stages"] == 3
    assert sweep["grid"] == [2 * 4 * 2, 1, 1] and sweep["registers"] is None
    fused = ask(2, 300, 4, 64, 1, 128)
    assert "fused_scan" in stages(fused) and fused["kernels"][-1]["tile"]["n"] == 128
    any_type = ask(2, 300, 4, 5, 1, 7, dtype=torch.float64)
    assert stages(any_type) == ["chunk_state", "state_passing", "chunk_scan"]


@pytest.mark.parametrize("p, n", [(64, 256), (80, 128), (32, 64), (40, 256), (64, 16), (80, 40)])
def test_the_forward_of_sm90_takes_what_it_pads_and_splits(ask, p, n):
    assert "fused_scan" in stages(ask(2, 300, 4, p, 1, n))
    assert "fused_scan" not in stages(ask(2, 300, 4, p, 1, n, card=(8, 0, 108)))
    assert stages(ask(2, 300, 4, p, 1, n, backward=True)) != []


@pytest.mark.parametrize("p", [32, 64, 80, 256])
def test_the_backward_of_sm90_pads_and_splits_heads(ask, p):
    split, pairs = ask(2, 300, 4, p, 1, 128, backward=True), 2 * -(-p // 64)
    assert stages(split)[1:4] == ["state_sweeps", "chunk_scan_backward", "delta_gradients"]
    assert split["kernels"][1]["grid"] == [2 * pairs, 2, 1]  # b; directions of time


@pytest.mark.parametrize("p, n", [(16, 64), (36, 64), (64, 96)])
def test_the_forward_of_sm90_leaves_the_rest(ask, p, n):
    assert "fused_scan" not in stages(ask(2, 300, 4, p, 1, n))


def test_a_long_sequence_is_swept_in_segments(ask):
    short, long = (ask(1, l, 80, 64, 1, 128, plan=SM80) for l in (1000, 65536))
    assert "segment_passing" not in stages(short)
    assert stages(long)[1:4] == ["chunk_state", "segment_passing", "chunk_state"]


def test_rows_that_nearly_fill_the_card_are_cut_into_runs_of_one_launch(ask):
    for b, l, h in ((8, 2048, 24), (2, 16384, 80), (1, 2048, 80)):
        answer = ask(b, l, h, 64, 1, 128)
        assert stages(answer) == ["fused_scan"] and answer["kernels"][0]["grid"][0] > b * h / 2
    assert stages(ask(1, 65536, 80, 64, 1, 128)) == ["fused_scan", "segment_scan", "fused_scan"]


def test_packed_sequences_and_a_gate_add_their_launches(ask):
    packed = ask(1, 300, 4, 64, 1, 128, sequences=3, backward=True, has_z=True, plan=SM80)
    assert stages(packed)[0] == "chunk_table" and stages(packed)[-1] == "zero_outside"
    assert "chunk_scan gate_backward" in stages(packed)
    packed = ask(1, 300, 4, 64, 1, 128, sequences=3, backward=True, has_z=True, plan=SM90)
    assert stages(packed)[2:5] == ["state_sweeps", "chunk_scan gate_backward", "state_sweeps"]


@pytest.mark.parametrize("card", CARDS, ids=str)
def test_shared_memory_fits_the_card(ask, card):
    """What a plan wants of a block, over all sizes that have kernels of their own."""
    sizes = (16, 32, 64, 80, 128, 256)
    for p, n, backward, has_z in itertools.product(sizes, sizes, (False, True), (False, True)):
        answer = ask(2, 700, 4, p, 2, n, backward=backward, has_z=has_z, card=card)
        assert answer["kernels"]  # one launch over whole sequences wants no workspace
        assert answer["workspace_bytes"] > 0 or stages(answer) == ["fused_scan"]
        most = max(kernel["shared_bytes"] for kernel in answer["kernels"])
        assert most <= CARDS[card] * 1024, (p, n, backward, has_z, stages(answer))


@pytest.mark.parametrize("plan", [SM80, SM90])
def test_kept_states_spare_the_forward_sweep(ask, plan):
    kept, again = (
        ask(2, 300, 80, 64, 1, 128, backward=True, save_states=keep, plan=plan)
        for keep in (True, False)
    )
    if plan == SM80:
        assert set(stages(again)) - set(stages(kept)) == {"chunk_state"}
    else:  # both directions of time in one launch, or one of them
        sweeps = (
            [k["grid"][1] for k in a["kernels"] if "sweeps" in k["stage"]] for a in (again, kept)
        )
        assert list(sweeps) == [[2], [1]]
    states = 2 * 3 * 80 * 64 * 128 * 2  # b, chunks, h, p, n, bytes
    assert again["workspace_bytes"] - kept["workspace_bytes"] == states


def test_no_states_are_kept_where_both_sweeps_fit_the_card(ask):
    kept, again = (
        ask(2, 300, 66, 64, 1, 128, backward=True, save_states=keep) for keep in (True, False)
    )
    assert kept == again


def test_nothing_to_do(ask):
    assert ask(2, 0, 4, 64, 1, 128) == {"workspace_bytes": 0, "kernels": []}


@pytest.mark.parametrize("plan", [ANY, SM80, SM90])
def test_afterwards_kernels_run_again(ask, emulated, plan):
    ask(1, 70, 2, 64, 1, 64, plan=plan)
    case = Case(b=1, l=70, h=2, g=1, p=64, n=64, dtype=torch.bfloat16)
    check(run_ops(emulated.ops, plan), case, repeat=False)


def block_bytes(size):
    """What PyTorch's allocator may take for a tensor: from 10 MiB on a segment of its own, of whole
    2 MiB; otherwise a part of one. It splits off what is left over if that is more than 1 MiB."""
    if size < 10 * 2**20:
        return size + 2**20
    left_over = -size % 2**21
    return size + left_over if left_over <= 2**20 else size


def training_step_bytes(ask, shape, plan, D_per_channel=False):
    """The most a step holds beyond its inputs."""
    b, l, h, p, g, n = shape.b, shape.l, shape.h, shape.p, shape.g, shape.n
    asked = ask(b, l, h, p, g, n, backward=True, D_per_channel=D_per_channel, plan=plan)
    y = dx = 2 * b * l * h * p
    dB = dC = 2 * b * l * g * n
    d_dt = 2 * b * l * h
    dA_d_dt_bias = 2 * 4 * h
    dD = 4 * h * (p if D_per_channel else 1)
    large = sum(map(block_bytes, (y, dx, dB, dC, d_dt, asked["workspace_bytes"])))
    return large + dA_d_dt_bias + dD


def mamba_ssm_bytes():
    """What a step of mamba_ssm takes on an H200, by shape: its last rows of bench.run."""
    rows = [row for row in load(RESULTS) if "peak_extra_bytes" in row and row["op"] == "ssd_train"]
    return {row["shape"]: row["peak_extra_bytes"] for row in rows if row["impl"] == "mamba_ssm"}


# What a step of mamba_ssm takes at b 1, h 80, p 64, g 1, n 128: measured on an H200, MB.
MAMBA_SSM_MB = {
    1024: 69.4, 2048: 111.0, 4096: 185.9, 6144: 272.6, 8192: 363.6, 10240: 452.5, 12288: 542.9,
    65536: 2882,
}  # fmt: skip


@pytest.mark.parametrize("l", MAMBA_SSM_MB)
def test_extra_memory_by_length(ask, l):
    """Lengths at which a group's heads are cut into slices, and others."""
    shape = dataclasses.replace(SHAPES["2.7b_b1_l2k"], l=l)
    assert training_step_bytes(ask, shape, SM90) <= MAMBA_SSM_MB[l] * 1e6


def test_extra_memory_with_D_of_channels(ask):
    """mamba_ssm's with D of heads."""
    name = "2.7b_b2_l16k"
    mine = training_step_bytes(ask, SHAPES[name], SM90, D_per_channel=True)
    assert mine <= mamba_ssm_bytes()[name]


@pytest.mark.parametrize("name, plan", [(name, SM90) for name in SHAPES] + [("2.7b_b8_l4k", SM80)])
def test_extra_memory_of_a_training_step(ask, name, plan):
    assert training_step_bytes(ask, SHAPES[name], plan) <= mamba_ssm_bytes()[name]
