"""Training of language models: data, recipe, the loop, checkpoints that a run goes on from."""

from .data import Windows, open_tokens, split, tokenize
from .recipe import Recipe, parameter_groups
from .run_state import load_state, newest_state, save_state
from .trainer import Trainer

__all__ = [
    "Recipe",
    "Trainer",
    "Windows",
    "load_state",
    "newest_state",
    "open_tokens",
    "parameter_groups",
    "save_state",
    "split",
    "tokenize",
]
