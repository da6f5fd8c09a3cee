"""The command-line program `mamba2`."""

from .program import main

__all__ = ["main"]
