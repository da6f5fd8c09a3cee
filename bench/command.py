"""What the benches on a GPU have in common: options, when they refuse, what every row says."""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch

from bench import rows, stamp


def parser(bench, doc, files):
    """The options that all have; `files` is what --results is the folder of."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench.{bench}", description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    out = Path(os.environ.get("OUT", stamp.ROOT / "bench/results"))
    add = made.add_argument
    add("--results", type=Path, default=out, help=f"folder of {files} (or $OUT)")
    add("--commit", default=None, help="what is measured, where git does not say")
    add("--unchecked", action="store_true", help="measure without green tests, and save nothing")
    return made


def add_mamba_ssm(made):
    """Where the rival lies."""
    help = "folder of the unpacked sdist (or $MAMBA_SSM, or third_party/)"
    made.add_argument("--mamba-ssm", help=help)


def begin(bench, options):
    """Ends the run where no GPU is or the tests are red; returns what every row says of it."""
    if not torch.cuda.is_available():
        raise SystemExit(
            f"bench.{bench} measures on a GPU; python -m bench.cpu measures on the CPU"
        )
    stamp.refuse_if_red(options.unchecked)
    command = shlex.join(["python", "-m", f"bench.{bench}", *sys.argv[1:]])
    return {"gpu": torch.cuda.get_device_name(), **rows.provenance(command, options.commit)}
