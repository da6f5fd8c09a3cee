"""Loads the compiled modules, and says in one sentence why one cannot be loaded.

The library's own start-up checks nothing: an old torch would fail on an undefined symbol. So
torch's version is compared first.
"""

import importlib
import platform
import re
from functools import cache
from pathlib import Path

import torch

OLDEST_TORCH = (2, 11)
HOW_TO_BUILD = (
    "build it with `make build` in a clone, or `pip install --no-build-isolation .` "
    "(docs/building.md)"
)


class BuildError(ImportError, RuntimeError):
    """A compiled part of mamba2_cuda is missing, or was built for something else."""


@cache
def load_ops():
    """Registers torch.ops.mamba2_cuda.* and their fakes; returns the path of the library.

    Raises BuildError when torch is too old, or the library is absent or does not load.
    """
    check_torch(torch.__version__)
    path = find_library("_ops", Path(__file__).parent)
    try:
        torch.ops.load_library(str(path))
    except OSError as cause:
        raise BuildError(
            f"mamba2_cuda: {path.name} does not load with torch {torch.__version__}, Python "
            f"{platform.python_version()}, {' '.join(platform.libc_ver())} on "
            f"{platform.machine()}: it was built for something else ({cause}); {HOW_TO_BUILD}"
        ) from cause
    importlib.import_module("mamba2_cuda._fakes")  # describes operators that are registered
    return path


@cache
def load_questions():
    """The module mamba2_cuda._C. Raises BuildError when it is not built for this Python."""
    try:
        return importlib.import_module("mamba2_cuda._C")
    except ImportError as cause:
        raise BuildError(
            "mamba2_cuda: _C, which answers explain() and build_info(), is not built for Python "
            f"{platform.python_version()}; the operators work without it; {HOW_TO_BUILD}"
        ) from cause


def check_torch(version):
    """Raises BuildError when torch is older than the stable ABI the operators are built for."""
    found = tuple(map(int, re.match(r"(\d+)\.(\d+)", version).groups()))
    if found < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(f"mamba2_cuda needs torch {oldest} or newer, found torch {version}")


def find_library(stem, folder):
    """The shared library `stem` in `folder`, whatever suffix its build gave it."""
    found = sorted(folder.glob(f"{stem}.*so"))
    if not found:
        raise BuildError(f"mamba2_cuda: {stem} is not built (none in {folder}); {HOW_TO_BUILD}")
    return found[0]
