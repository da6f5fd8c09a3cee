"""Rewrite a model in another checkpoint format; its tokenizer goes along.

mamba2 convert mamba2-130m converted --to huggingface
mamba2 convert codestral converted --to state-spaces --container pickle
"""

import shutil
from pathlib import Path

from mamba2_cuda.model import load_model, save_model
from mamba2_cuda.model.checkpoint import CONTAINERS, FORMATS

from .common import DTYPES, add_dtype


def add_options(parser):
    parser.add_argument("source", type=Path, help="folder of config.json and weights")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--to", choices=FORMATS, required=True, help="format to write")
    parser.add_argument(
        "--container",
        choices=CONTAINERS,
        default="safetensors",
        help="file of the weights (%(default)s)",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="rows of the vocabulary that are tokens, where the rest is padding",
    )
    add_dtype(parser, "as stored")


def run(options):
    if options.target.resolve() == options.source.resolve():
        raise ValueError("source and target are the same folder")
    dtype = DTYPES.get(options.dtype)
    model = load_model(options.source, dtype=dtype, vocab_size=options.vocab_size)
    save_model(model, options.target, options.to, options.container)
    for file in sorted(options.source.glob("tokenizer*.json")):
        shutil.copy(file, options.target)
    print(f"{options.target}: {options.to}, {options.container}")
