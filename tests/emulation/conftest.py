"""Fixtures of tests that run CUDA kernels on the host emulation."""

import ctypes
import importlib.util
from pathlib import Path

import pytest
import torch

TIMINGS = ("random", "early", "late")


def load_build():
    spec = importlib.util.spec_from_file_location(
        "emulation_build", Path(__file__).with_name("build.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulation_build():
    """The module build.py; skips where there are no CUDA headers to compile with."""
    module = load_build()
    if module.cuda_include() is None:
        pytest.skip("no CUDA headers on this machine")
    return module


class Emulated:
    """The operators on the emulated card.

    ops       torch.ops.mamba2_cuda_emulated: takes CPU tensors
    schedule  how the next launches run: random draws start from `seed`; asynchronous work happens
              early, late or at random; `blocks` of a grid run at the same time; `sms` is what the
              card says of itself
    """

    def __init__(self, library):
        torch.ops.load_library(str(library))
        self.ops = torch.ops.mamba2_cuda_emulated
        self._set = ctypes.CDLL(str(library)).mamba2_emulation_schedule
        self._set.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int]

    def schedule(self, seed=1, timing="random", blocks=4, sms=4):
        self._set(seed, TIMINGS.index(timing), blocks, sms)


@pytest.fixture(scope="session")
def emulated_library(emulation_build):
    return Emulated(emulation_build.build_operators())


@pytest.fixture
def emulated(emulated_library):
    """The operators on the emulated card, with the schedule as at the start."""
    emulated_library.schedule()
    return emulated_library
