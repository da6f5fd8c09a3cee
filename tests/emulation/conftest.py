"""Fixtures of tests that run CUDA kernels on the host emulation."""

import importlib.util
from pathlib import Path

import pytest
from emulated_card import Emulated


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


@pytest.fixture(scope="session")
def emulated_library(emulation_build):
    return Emulated(emulation_build.build_operators())


@pytest.fixture
def emulated(emulated_library):
    """The operators on the emulated card, with the schedule as at the start."""
    emulated_library.schedule()
    return emulated_library
