"""Language models of Mamba-2 blocks: shape, weights, generation."""

from .config import ModelConfig
from .language_model import Mamba2LMHeadModel

__all__ = ["Mamba2LMHeadModel", "ModelConfig"]
