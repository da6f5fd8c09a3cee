"""What several commands ask for."""

import torch

from mamba2_cuda.tokenizer import BYTES, ByteTokenizer, open_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_device(parser):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="cpu, cuda, cuda:1 ... (%(default)s)")


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
