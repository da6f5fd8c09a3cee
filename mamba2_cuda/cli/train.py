"""Train a language model on text files, or on a file of tokens.

  mamba2 train --data *.txt --out run --size 130m --steps 1000 --batch 8 --length 2048
  mamba2 train --tokens corpus.bin --vocab-size 50277 --out run --steps 1000
  mamba2 train --out run --resume          (after it was stopped, or killed)

The result is RUN/model, for mamba2 generate; RUN/log.jsonl has a line for every step, RUN/loss.png
the curve. Text is trained on as bytes unless --tokenizer names a tokenizer.json.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import torch

from mamba2_cuda.model import Mamba2LMHeadModel, ModelConfig
from mamba2_cuda.model.checkpoint import read_json, replace
from mamba2_cuda.tokenizer import BYTES, open_tokenizer
from mamba2_cuda.training import Recipe, Trainer, Windows, open_tokens, split, tokenize
from mamba2_cuda.training.data import DTYPES, check_tokens
from mamba2_cuda.training.report import can_plot

from .common import add_device

SIZES = {
    "tiny": dict(d_model=128, n_layer=4, ssm_cfg=dict(headdim=32, d_state=32)),
    "130m": dict(d_model=768, n_layer=24),
    "370m": dict(d_model=1024, n_layer=48),
    "780m": dict(d_model=1536, n_layer=48),
    "1.3b": dict(d_model=2048, n_layer=48),
    "2.7b": dict(d_model=2560, n_layer=64),
}
HELP = {
    "steps": "steps of the optimizer",
    "batch": "windows a step",
    "length": "tokens in a window",
    "rate": "highest learning rate",
    "min_rate": "learning rate at the end",
    "warmup": "share of the steps over which the rate rises",
    "weight_decay": "of matrices; vectors such as A_log, D and dt_bias do not decay",
    "clip": "largest norm of the gradient",
    "accumulate": "parts of a batch, one after another, for less memory",
    "validate_every": "steps between looks at the held-out text",
    "save_every": "steps between checkpoints",
    "seed": "of the initial weights and the order of the data",
}
DEFAULTS = dict(steps=1000, batch=8, length=512)
OF_A_RESUMED_RUN = {"command", "run", "default_of", "out", "resume", "device"}


def add_options(parser):
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    data = parser.add_argument_group("data, one of the two")
    data.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="text files, UTF-8")
    data.add_argument("--tokens", type=Path, metavar="FILE", help="raw tokens, little endian")
    data.add_argument("--token-dtype", choices=DTYPES, default="uint16", help="(%(default)s)")
    data.add_argument("--vocab-size", type=int, metavar="N", help="number of tokens, with --tokens")
    data.add_argument(
        "--tokenizer",
        default=BYTES,
        metavar="NAME",
        help="bytes, or a tokenizer.json, with --data (%(default)s)",
    )
    data.add_argument(
        "--held-out",
        type=float,
        default=0.05,
        metavar="F",
        help="last share of the tokens, never trained on (%(default)s)",
    )
    model = parser.add_argument_group("model, one of the two").add_mutually_exclusive_group()
    model.add_argument("--size", choices=SIZES, default="tiny", help="(%(default)s)")
    model.add_argument("--config", type=Path, metavar="FILE", help="a config.json")
    recipe = parser.add_argument_group("recipe")
    for field in dataclasses.fields(Recipe):
        if field.name in HELP:
            default = DEFAULTS.get(field.name, field.default)
            recipe.add_argument(
                f"--{field.name.replace('_', '-')}", type=field.type, default=default,
                metavar="N" if field.type is int else "F", help=f"{HELP[field.name]} (%(default)s)",
            )  # fmt: skip
    recipe.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    recipe.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="compute layers again in the backward, for less memory",
    )
    add_device(parser)
    parser.set_defaults(default_of=parser.get_default)


def run(options):
    if options.resume:
        refuse_others(options)
        run = read_json(options.out / "run.json")
    else:
        run = prepare(options)
    recipe, windows = open_run(run, options.out)
    torch.manual_seed(recipe.seed)
    model = Mamba2LMHeadModel(ModelConfig.from_dict(run["config"]), device=options.device)
    count = sum(p.numel() for p in model.parameters())
    training, held_out = (len(w.tokens) for w in windows)
    print(f"{count:,} parameters, {training:,} tokens to train on, {held_out:,} held out")
    Trainer(model, recipe, *windows, options.out).run(resume=options.resume)
    if run["tokenizer"] not in (BYTES, None):
        shutil.copy(options.out / run["tokenizer"], options.out / "model/tokenizer.json")
    if not can_plot():
        print("no loss.png: matplotlib, which draws it, is not installed")
    print(f"the model: {options.out / 'model'}")


def refuse(options, names, why):
    """Options that would be overlooked: what is not as it would be if not given."""
    for name in names:
        if getattr(options, name) != options.default_of(name):
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def refuse_others(options):
    """--resume goes on with what the run began with."""
    others = [name for name in vars(options) if name not in OF_A_RESUMED_RUN]
    refuse(options, others, "cannot be changed with --resume: begin another run")


def refuse_idle(options):
    """What goes with the other kind of data."""
    if options.data is not None:
        refuse(options, ("vocab_size", "token_dtype"), "has no meaning with --data")
    else:
        refuse(options, ("tokenizer",), "has no meaning with --tokens")


def open_run(run, out):
    """(recipe, (windows of training, held-out windows)) of run.json's content."""
    try:
        recipe = Recipe(**{**run["recipe"], "betas": tuple(run["recipe"]["betas"])})
        path, dtype, count, share = (
            run[k] for k in ("tokens", "token_dtype", "token_count", "held_out")
        )
    except (KeyError, TypeError) as cause:
        raise ValueError(f"{out / 'run.json'}: damaged: {cause!r}") from cause
    path = out / path  # which may be absolute
    tokens = open_tokens(path, dtype)
    if len(tokens) != count:
        raise ValueError(f"{path}: {len(tokens)} tokens, but {count} when the run began")
    training, held_out = split(tokens, share)
    return recipe, (
        Windows(training, recipe.length, recipe.seed),
        Windows(held_out, recipe.length, what="held-out tokens"),
    )


def prepare(options):
    """Writes the tokens and run.json, which is all that --resume needs; returns its content.

    run.json comes last, when nothing is left to refuse."""
    if (options.out / "run.json").exists():
        raise ValueError(f"{options.out} holds a run: --resume it, or choose another --out")
    if (options.data is None) == (options.tokens is None):
        raise ValueError("give --data or --tokens, one of the two")
    recipe = make_recipe(options)
    refuse_idle(options)
    name = None
    if options.data is not None:
        tokenizer = open_tokenizer(options.tokenizer)
        vocab_size, name = tokenizer.vocab_size, tokenizer.name
    elif options.vocab_size is None:
        raise ValueError("--tokens needs --vocab-size")
    else:
        vocab_size = options.vocab_size
    config = make_config(options, vocab_size)
    Mamba2LMHeadModel(config, device="meta")  # refuses what no model can be
    options.out.mkdir(parents=True, exist_ok=True)
    if options.data is not None:
        tokens = "tokens.bin"  # in the folder, wherever that is
        dtype = tokenize(options.data, tokenizer, options.out / tokens)
    else:
        tokens, dtype = str(options.tokens.resolve()), options.token_dtype
        check_tokens(open_tokens(tokens, dtype), vocab_size, tokens)
    if name not in (BYTES, None):
        shutil.copy(name, options.out / "tokenizer.json")
        name = "tokenizer.json"
    run = {
        "config": config.to_dict(),
        "recipe": dataclasses.asdict(recipe),
        "tokens": tokens,
        "token_dtype": dtype,
        "token_count": len(open_tokens(options.out / tokens, dtype)),
        "held_out": options.held_out,
        "tokenizer": name,
    }
    open_run(run, options.out)
    text = json.dumps(run, indent=2) + "\n"
    replace(options.out / "run.json", lambda path: path.write_text(text))
    return run


def make_config(options, vocab_size):
    if options.config is None:
        return ModelConfig(vocab_size=vocab_size, pad_vocab_size_multiple=16, **SIZES[options.size])
    config = ModelConfig.from_dict(read_json(options.config))
    return dataclasses.replace(config, vocab_size=vocab_size)


def make_recipe(options):
    return Recipe(
        **{name: getattr(options, name) for name in HELP},
        bf16=not options.fp32,
        activation_checkpointing=options.activation_checkpointing,
    )
