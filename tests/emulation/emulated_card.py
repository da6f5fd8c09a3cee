"""The emulated card: operators that run the CUDA kernels' own sources, and how they run."""

import ctypes

import torch

TIMINGS = ("random", "early", "late")


class Emulated:
    """The operators on the emulated card.

    ops       torch.ops.mamba2_cuda_emulated: takes CPU tensors
    schedule  how the next launches run: random draws start from `seed`; asynchronous work happens
              early, late or at random; `blocks` of a grid run at the same time; `sms` and
              `max_smem_bytes`, of a block, are what the card says of itself; flags are raised no
              further than `most_released`
    """

    def __init__(self, library):
        torch.ops.load_library(str(library))
        self.ops = torch.ops.mamba2_cuda_emulated
        self._set = ctypes.CDLL(str(library)).mamba2_emulation_schedule
        self._set.argtypes = [ctypes.c_uint64, *[ctypes.c_int] * 5]

    def schedule(
        self,
        seed=1,
        timing="random",
        blocks=4,
        sms=4,
        max_smem_bytes=227 << 10,
        most_released=2**31 - 1,
    ):
        self._set(seed, TIMINGS.index(timing), blocks, sms, max_smem_bytes, most_released)
