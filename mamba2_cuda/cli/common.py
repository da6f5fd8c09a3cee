"""What several commands ask for."""

import argparse

import torch

from mamba2_cuda.tokenizer import BYTES, ByteTokenizer, open_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_device(parser):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    help = "cpu, cuda, cuda:1 ... (%(default)s)"
    parser.add_argument("--device", type=device_here, default=device, help=help)


def device_here(name):
    """The name, where this machine has such a device."""
    try:
        device = torch.device(name)
        cuda = device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
        here = device.type == "cpu" or cuda
    except RuntimeError:
        here = False
    if not here:
        raise argparse.ArgumentTypeError(
            f"no device {name!r}: cpu, and {torch.cuda.device_count()} of CUDA, are here"
        )
    return name


def add_dtype(parser, default):
    parser.add_argument("--dtype", choices=DTYPES, help=f"of the weights (default: {default})")


def find_tokenizer(name, folder, config):
    """The tokenizer that was asked for, or else the one that a model's folder speaks of."""
    if name is not None:
        tokenizer = open_tokenizer(name)
    elif (folder / "tokenizer.json").exists():
        tokenizer = open_tokenizer(folder)
    elif config.vocab_size == ByteTokenizer.vocab_size:
        tokenizer = open_tokenizer(BYTES)
    else:
        raise ValueError(f"no tokenizer.json in {folder}: give --tokenizer")
    if tokenizer.vocab_size > config.padded_vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.padded_vocab_size}"
        )
    return tokenizer
