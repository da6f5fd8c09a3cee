"""mamba2: train, generate with, convert and look at Mamba-2 language models."""

import argparse
import sys

from mamba2_cuda import __version__
from mamba2_cuda.model import CheckpointError

from . import convert, generate, info, train

COMMANDS = {"generate": generate, "train": train, "convert": convert, "info": info}


def main(arguments=None):
    """Runs one command; returns the exit status: 2 for what the user can put right."""
    options = make_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (CheckpointError, ValueError, OSError) as problem:
        print(f"mamba2 {options.command}: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def make_parser():
    parser = argparse.ArgumentParser(prog="mamba2", description=__doc__)
    parser.add_argument("--version", action="version", version=f"mamba2_cuda {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_options(command)
        command.set_defaults(run=module.run)
    return parser
