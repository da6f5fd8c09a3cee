"""Continue prompts with a model, printing as it goes.

mamba2 generate out/model --prompt "The quick" --max-new-tokens 100 --temperature 0.8
echo "The quick" | mamba2 generate out/model --temperature 0
"""

import dataclasses
import sys
from pathlib import Path

from mamba2_cuda.model import Sampling, load_model
from mamba2_cuda.model import generate as generate_tokens
from mamba2_cuda.tokenizer import TextStream

from .common import DTYPES, add_device, add_dtype, find_tokenizer


def add_options(parser):
    parser.add_argument("model", type=Path, help="folder of config.json and weights")
    parser.add_argument(
        "--prompt",
        action="append",
        help="text to continue; several make a batch (default: standard input)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=100,
        metavar="N",
        help="tokens to add at most (%(default)s)",
    )
    sampling = parser.add_argument_group("choice of a token, in this order")
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="F",
        help="weaken what has occurred, 1.2 for example (%(default)s: do not)",
    )
    sampling.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="below 1 bolder, 0 the most likely token always (%(default)s)",
    )
    sampling.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="only the K most likely tokens (%(default)s: all)",
    )
    sampling.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="only the most likely, of probability P together (%(default)s)",
    )
    sampling.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="only tokens P times as likely as the likeliest (%(default)s)",
    )
    parser.add_argument("--seed", type=int, help="repeat the same draws")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end of a text")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="bytes, or a tokenizer.json (default: what the folder holds)",
    )
    add_device(parser)
    add_dtype(parser, "bf16 on CUDA, as stored on the CPU")


def run(options):
    dtype = options.dtype or ("bf16" if options.device.startswith("cuda") else None)
    model = load_model(options.model, device=options.device, dtype=DTYPES.get(dtype)).eval()
    tokenizer = find_tokenizer(options.tokenizer, options.model, model.config)
    texts = options.prompt or [sys.stdin.read()]
    prompts = [tokenizer.encode(text) for text in texts]
    if not all(prompts):
        raise ValueError("a prompt must not be empty")
    eos = () if options.ignore_eos or tokenizer.eos is None else (tokenizer.eos,)
    names = (field.name for field in dataclasses.fields(Sampling))
    settings = dict(
        sampling=Sampling(**{name: getattr(options, name) for name in names}),
        eos=eos,
        seed=options.seed,
    )
    if len(texts) == 1:
        stream(model, tokenizer, texts[0], prompts, options.max_new_tokens, settings)
        return
    said = generate_tokens(model, prompts, options.max_new_tokens, **settings)
    for prompt, tokens in zip(prompts, said):
        print(tokenizer.decode(prompt + [t for t in tokens if t not in eos]) + "\n")


def stream(model, tokenizer, text, prompts, count, settings):
    """Prints one continuation, a character as soon as it is whole."""
    pieces = TextStream(tokenizer, prompts[0])

    def say(tokens):
        if tokens[0] not in settings["eos"]:
            print(pieces.add(tokens[0]), end="", flush=True)

    print(text, end="", flush=True)
    generate_tokens(model, prompts, count, callback=say, **settings)
    print(pieces.rest())
