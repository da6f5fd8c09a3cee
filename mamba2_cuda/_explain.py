"""Questions to the build: what it holds, and which kernels a problem gets."""

import ctypes
import json

import torch

from mamba2_cuda._load import load_ops, load_questions


def build_info():
    """What this build holds, as a dict.

    Returns version; with_cuda; archs, the compute capabilities it was built for as in
    TORCH_CUDA_ARCH_LIST ("" on a CPU-only build); ops, the path of the operator library.
    Raises BuildError when a compiled part is missing.
    """
    return {**load_questions().build_info(), "ops": str(load_ops())}


def explain(
    *,
    b,
    l,
    h,
    p,
    g=1,
    n,
    dtype=torch.bfloat16,
    sequences=None,
    backward=False,
    has_z=False,
    save_states=False,
    device=None,
    plan=0,
):
    """Which kernels ssd_scan takes for a problem, and why; nothing is run.

    b batch, l length, h heads, p head dim, g groups, n state dim; sequences: how many cu_seqlens
    packs into the row (None: no cu_seqlens). device: a torch device (None: the current GPU, or the
    CPU if there is none), or (major, minor, multiprocessors) of a card that need not be here.
    plan: the private integer of the operators, to ask about a forced tier.

    Returns a dict: tier ("cpu", "any", "sm80", "sm90"), reason, q (tokens in a chunk), chunks,
    segment_chunks (0: sequences are not split), variant, floor_bytes (every input read once, every
    output written once), flops (of the block form with chunks of 64), workspace_bytes (device
    memory that the call takes and gives back), kernels: in the order of their launches, for each
        stage, grid, threads, shared_bytes of a block (dynamic), registers of a thread (None: the
        card is not here to ask), tile {tokens, p, n} that a block works on at a time, stages of
        its ring of copies (0: none; 0 in tile: it takes all or does not have it)
    with D of a head, dt_bias and softplus, and without initial states. They come from running the
    tier's own host code with nothing launched. None on a build without CUDA; [] for the CPU.
    Raises BuildError when mamba2_cuda._C is not built for this Python or _ops does not load.
    """
    major, minor, sm_count = capability(device)
    nseq, packed = (b, False) if sequences is None else (sequences, True)
    answer = load_questions().plan(
        b, l, h, p, g, n,
        nseq=nseq,
        packed=packed,
        dtype=str(dtype).removeprefix("torch."),
        backward=backward,
        has_z=has_z,
        save_states=save_states,
        major=major,
        minor=minor,
        sm_count=sm_count,
        forced=plan,
    )  # fmt: skip
    op = "bwd" if backward else "fwd"
    answer["floor_bytes"] = floor_bytes(op, b, l, h, p, g, n, has_z, dtype.itemsize)
    answer["flops"] = flops(op, b, l, h, p, g, n)
    if major == 0:
        return answer | {"workspace_bytes": 0, "kernels": []}
    problem = (b, l, h, p, g, n, nseq, packed, DTYPES.index(dtype), backward, has_z, save_states)
    D_per_channel = False
    return answer | launches(
        load_ops(), *problem, D_per_channel, major, minor, sm_count, plan, is_here(major, minor)
    )


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # as csrc/core/dtype.h


def launches(library, *question):
    """workspace_bytes and kernels of a problem, from a library of operators."""
    try:
        ask = ctypes.CDLL(str(library)).mamba2_explain
    except AttributeError:  # built without CUDA
        return {"workspace_bytes": None, "kernels": None}
    ask.restype = ctypes.c_char_p
    found = json.loads(ask((ctypes.c_int64 * len(question))(*map(int, question))))
    if found["error"]:
        raise RuntimeError(f"explain: the plan's host code fails with CUDA error {found['error']}")
    for kernel in found["kernels"]:
        kernel["registers"] = kernel["registers"] if kernel["registers"] >= 0 else None
    return {k: found[k] for k in ("workspace_bytes", "kernels")}


def is_here(major, minor):
    """Whether the current GPU is such a card."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (major, minor)


def capability(device):
    """(major, minor, multiprocessors) of a device; (0, 0, 1) for the CPU."""
    if isinstance(device, tuple):
        return device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cpu":
        return 0, 0, 1
    found = torch.cuda.get_device_properties(device)
    return found.major, found.minor, found.multi_processor_count


def floor_bytes(op, b, l, h, p, g, n, has_z=False, element=2):
    """Bytes that op ("fwd" or "bwd") must move: every input read once, every output written once.

    x, dt, B, C, y and their gradients of `element` bytes; what is (h,) or per sequence is nothing.
    """
    x, dt, BC = b * l * h * p, b * l * h, 2 * b * l * g * n
    z = x if has_z else 0
    forward = 2 * x + dt + BC + z  # x, dt, B, C, z -> y
    backward = 3 * x + 2 * (dt + BC + z)  # x, dy, dt, B, C, z -> dx, d_dt, dB, dC, dz
    return element * {"fwd": forward, "bwd": backward}[op]


def flops(op, b, l, h, p, g, n, q=64):
    """FLOPs of the block form with chunks of q, C B^T and its gradient computed once for a group.

    Forward: C B^T; M X; and for the states X~^T B and S C. Backward: C B^T; the states again; their
    gradients dY^T C; and into dx, dM, dB and dC one product inside the chunk and one across each,
    those of dB and dC after dM is summed over the heads of the group.
    """
    inside, across = 2 * q * p, 2 * n * p  # one product, for a token of a head
    scores = 2 * q * n  # one product, for a token of a group
    forward = h * (inside + 2 * across) + g * scores
    backward = h * (2 * inside + 5 * across) + g * 3 * scores
    return b * l * {"fwd": forward, "bwd": backward}[op]
