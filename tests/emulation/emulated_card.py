"""The emulated card: operators that run the CUDA kernels' own sources, and how they run."""

import ctypes

import torch

TIMINGS = ("random", "early", "late")


class Emulated:
    """The operators on the emulated card.

    ops       torch.ops.mamba2_cuda_emulated: takes CPU tensors
    schedule  how the next launches run: random draws start from `seed`; asynchronous work happens
              early, late or at random; `blocks` of a grid run at the same time; `sms` and
              `capability` are what the card says of itself
    """

    def __init__(self, library):
        torch.ops.load_library(str(library))
        self.ops = torch.ops.mamba2_cuda_emulated
        library = ctypes.CDLL(str(library))
        self._set, self._set_capability = (
            library.mamba2_emulation_schedule,
            library.mamba2_emulation_capability,
        )
        self._set.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int]
        self._set_capability.argtypes = [ctypes.c_int, ctypes.c_int]

    def schedule(self, seed=1, timing="random", blocks=4, sms=4, capability=(9, 0)):
        self._set(seed, TIMINGS.index(timing), blocks, sms)
        self._set_capability(*capability)
