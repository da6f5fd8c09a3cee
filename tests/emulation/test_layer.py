"""The host emulation of the ptx layer: right kernels pass under every schedule, seeded faults show.

A fault is found when a launch fails with a message, or when the result is wrong or NaN, under at
least one schedule of the list; most show under each.
"""

import ctypes
import re
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).with_name("kernels")
TIMINGS = {"random": 0, "early": 1, "late": 2}
SCHEDULES = [(seed, timing) for timing in TIMINGS for seed in (1, 2)]
# T, N, A as stored, B as stored: the variants of kernels/operands.cu
VARIANTS = [
    (torch.bfloat16, 64, "k_major", "k_major"),
    (torch.bfloat16, 128, "registers", "k_major"),
    (torch.bfloat16, 128, "registers", "n_major"),
    (torch.float16, 80, "k_major", "n_major"),
    (torch.float16, 32, "m_major", "n_major"),
    (torch.bfloat16, 128, "m_major", "k_major"),
]


def faults_of(section):
    """Names under `// section` of enum class Fault, and the number of each."""
    text = (KERNELS / "self_test.h").read_text().split("enum class Fault : int {")[1].split("};")[0]
    found, here, number = {}, "", 0
    for line in map(str.strip, text.strip().splitlines()):
        if line.startswith("//"):
            here = line[3:]
            continue
        if here == section:
            found[line.rstrip(",")] = number
        number += 1
    return found


def number_of(fault):
    sections = re.findall(r"// (\w+)$", (KERNELS / "self_test.h").read_text(), re.MULTILINE)
    every = {"none": 0} | {k: v for s in sections for k, v in faults_of(s).items()}
    return every[fault]


@pytest.fixture(scope="module")
def layer(emulation_build):
    library = emulation_build.build("self_test", sorted(KERNELS.glob("*.cu")))
    layer = ctypes.CDLL(str(library))
    layer.last_error.restype = ctypes.c_char_p
    layer.schedule.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
    layer.tensor_map.argtypes = [ctypes.c_uint64, *[ctypes.c_int], *[ctypes.c_void_p] * 3] + [
        ctypes.c_int
    ]
    return layer


class Gemm(ctypes.Structure):
    _fields_ = [(f, ctypes.c_int) for f in "mnk"] + [(f, ctypes.c_void_p) for f in "abc"]


class Tickets(ctypes.Structure):
    _fields_ = [(f, ctypes.c_int) for f in ("segments", "length")]
    _fields_ += [(f, ctypes.c_void_p) for f in ("x", "y", "carry", "words")]


class Progress(ctypes.Structure):
    _fields_ = [("tiles", ctypes.c_int)]
    _fields_ += [(f, ctypes.c_void_p) for f in ("x", "tile", "y", "count")]


class Prepared(ctypes.Structure):
    _fields_ = [(f, ctypes.c_int) for f in ("length", "h", "zero_count")]
    _fields_ += [(f, ctypes.c_void_p) for f in ("dt", "A", "delta", "a_cumsum_log2", "zeros")]


class Operands(ctypes.Structure):
    _fields_ = [("variant", ctypes.c_int)] + [(f, ctypes.c_void_p) for f in "abd"]


def launch(layer, name, params, fault, schedule, blocks=4):
    """The error code and message of one launch."""
    seed, timing = schedule
    layer.schedule(seed, TIMINGS[timing], blocks)
    error = getattr(layer, name)(ctypes.byref(params), number_of(fault))
    return error, layer.last_error().decode() if error else ""


def relative_error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def gemm(layer, name, fault, schedule, m=150, n=136, k=520):
    """(error, message, relative error) of a product of random matrices with ragged edges."""
    random = torch.Generator().manual_seed(m + n)
    a, b = (torch.randn(r, k, generator=random).bfloat16() for r in (m, n))
    c = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    params = Gemm(m, n, k, a.data_ptr(), b.data_ptr(), c.data_ptr())
    error, message = launch(layer, name, params, fault, schedule)
    return error, message, relative_error(c, a.double() @ b.double().T)


def product(layer, variant, fault, schedule):
    """The same for one product of operands.cu."""
    dtype, n, a_stored, b_stored = VARIANTS[variant]
    random = torch.Generator().manual_seed(variant)
    a, b = (torch.randn(*s, generator=random).to(dtype) for s in ((64, 64), (64, n)))
    given_a = a.T.contiguous() if a_stored == "m_major" else a
    given_b = b.T.contiguous() if b_stored == "k_major" else b
    d = torch.full((64, n), float("nan"))
    params = Operands(variant, given_a.data_ptr(), given_b.data_ptr(), d.data_ptr())
    error, message = launch(layer, "operands", params, fault, schedule)
    return error, message, relative_error(d, a.double() @ b.double())


def cumulative_sum(layer, fault, schedule, segments=12, length=50):
    x = torch.arange(segments * length).float() % 7
    y, carry = torch.full_like(x, float("nan")), torch.full((segments,), float("nan"))
    words = torch.zeros(1 + segments, dtype=torch.int32)
    params = Tickets(segments, length, *(t.data_ptr() for t in (x, y, carry, words)))
    error, message = launch(layer, "tickets", params, fault, schedule)
    return error, message, relative_error(y, x.double().cumsum(0))


def doubled(layer, fault, schedule, tiles=20):
    x = torch.arange(tiles * 32).float() + 1
    tile, y = (torch.full_like(x, float("nan")) for _ in range(2))
    count = torch.zeros(1, dtype=torch.int32)
    params = Progress(tiles, *(t.data_ptr() for t in (x, tile, y, count)))
    error, message = launch(layer, "progress", params, fault, schedule)
    return error, message, relative_error(y, 2 * x.double())


ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit of the stored result


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", ["wgmma_gemm", "mma_gemm"])
def test_gemm_is_right_under_every_schedule(layer, name, schedule):
    error, message, distance = gemm(layer, name, "none", schedule)
    assert error == 0, message
    assert distance < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_every_operand_layout(layer, variant, schedule):
    error, message, distance = product(layer, variant, "none", schedule)
    assert error == 0, message
    assert distance < ROUNDING[VARIANTS[variant][0]]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_blocks_that_wait_for_each_other_make_progress(layer, schedule):
    error, message, distance = cumulative_sum(layer, "none", schedule)
    assert error == 0, message
    assert distance == 0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_block_works_beside_the_one_before_it(layer, schedule):
    error, message, distance = doubled(layer, "none", schedule)
    assert error == 0, message
    assert distance == 0


@pytest.mark.parametrize("zero_count", [1, 5000])
def test_chunk_cumsum_leaves_zero_counts(layer, zero_count):
    length, h = 130, 18
    dt = torch.rand(length, h, generator=torch.Generator().manual_seed(zero_count))
    A, (delta, a_cumsum_log2) = -torch.ones(h), torch.full((2, 2, h, 128), float("nan"))
    counts = torch.full((zero_count + 1,), 7, dtype=torch.int32)
    arrays = (t.data_ptr() for t in (dt, A, delta, a_cumsum_log2, counts))
    assert layer.preparation(ctypes.byref(Prepared(length, h, zero_count, *arrays))) == 0
    assert counts[:-1].eq(0).all() and counts[-1] == 7
    assert torch.equal(delta[0].T, dt[:128])


def shows(outcomes, tolerance):
    """Whether some schedule failed or gave a result that is not right (NaN is not)."""
    return any(error or not distance < tolerance for error, _, distance in outcomes)


@pytest.mark.parametrize("fault", faults_of("wgmma_gemm"))
def test_wgmma_gemm_fault_shows(layer, fault):
    assert shows([gemm(layer, "wgmma_gemm", fault, s) for s in SCHEDULES], 2.0**-8)


@pytest.mark.parametrize("fault", faults_of("mma_gemm"))
def test_mma_gemm_fault_shows(layer, fault):
    assert shows([gemm(layer, "mma_gemm", fault, s) for s in SCHEDULES], 2.0**-8)


@pytest.mark.parametrize("fault", faults_of("tickets"))
def test_ticket_fault_shows(layer, fault):
    assert shows([cumulative_sum(layer, fault, s) for s in SCHEDULES], 1e-6)


@pytest.mark.parametrize("fault", faults_of("operands"))
def test_operand_fault_shows(layer, fault):
    assert shows([product(layer, 2, fault, s) for s in SCHEDULES], 2.0**-8)


@pytest.mark.parametrize("fault", faults_of("progress"))
def test_progress_fault_shows(layer, fault):
    assert shows([doubled(layer, fault, s) for s in SCHEDULES], 1e-6)


PROGRESS_MESSAGES = {
    "count_too_low": "deadlock",
    "no_fence_behind_count": "no fence_proxy_async_global",
    "no_wait_for_count": "without griddepcontrol_wait or ld_acquire_gpu",
    "no_grid_wait": "no block of a programmatic launch called griddepcontrol_wait",
}
GEMM_MESSAGES = {
    "producer_phase": "deadlock",
    "too_many_bytes": "16 bytes missing",
    "misaligned_descriptor": "descriptor",
    "descriptor_out_of_range": "outside the block's",
    "no_wgmma_wait": "nobody waited for",
    "no_wgmma_fence": "no wgmma_fence",
    "accumulator_in_flight": "wrote an accumulator",
    "no_store_wait": "bulk_wait_group_read",
    "no_proxy_fence": "without fence_proxy_async_shared",
    "no_init_fence": "fence_mbarrier_init",
    "arrival_count": "arrivals on the mbarrier",
    "registers": "setmaxnreg.inc",
}


@pytest.mark.parametrize("fault", GEMM_MESSAGES | PROGRESS_MESSAGES)
def test_messages_name_the_fault(layer, fault):
    if fault in GEMM_MESSAGES:
        error, message, _ = gemm(layer, "wgmma_gemm", fault, (1, "random"))
    else:
        error, message, _ = doubled(layer, fault, (1, "late"))
    assert error == 719 and (GEMM_MESSAGES | PROGRESS_MESSAGES)[fault] in message


def test_a_failed_launch_leaves_nothing_behind(layer):
    assert gemm(layer, "wgmma_gemm", "no_wgmma_wait", (1, "random"))[0] != 0
    error, message, distance = gemm(layer, "wgmma_gemm", "none", (1, "random"))
    assert error == 0 and distance < 2.0**-8, message


# base, dims, byte strides, box, swizzle: one rule broken each
GOOD_MAP = (4096, [64, 10, 3], [128, 2560], [64, 16, 1], 1)
BAD_MAPS = {
    "address": (4096 + 8, *GOOD_MAP[1:]),
    "stride": (4096, [64, 10, 3], [136, 2560], [64, 16, 1], 1),
    "negative stride": (4096, [64, 10, 3], [-128, 2560], [64, 16, 1], 1),
    "no element": (4096, [64, 0, 3], [128, 2560], [64, 16, 1], 1),
    "box of 257": (4096, [64, 10, 3], [128, 2560], [64, 257, 1], 1),
    "swizzled row of 64 bytes": (4096, [64, 10, 3], [128, 2560], [32, 16, 1], 1),
    "row of 24 bytes": (4096, [64, 10, 3], [128, 2560], [12, 16, 1], 0),
}


def encode(layer, base, dims, strides, box, swizzle):
    longs = [(ctypes.c_int64 * len(v))(*v) for v in (dims, strides)]
    return layer.tensor_map(base, len(dims), *longs, (ctypes.c_int * len(box))(*box), swizzle)


def test_a_legal_tensor_map_is_taken(layer):
    assert encode(layer, *GOOD_MAP) == 0


@pytest.mark.parametrize("rule", BAD_MAPS)
def test_tensor_map_rules(layer, rule):
    assert encode(layer, *BAD_MAPS[rule]) != 0
