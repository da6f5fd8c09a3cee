"""Language models of Mamba-2 blocks: shape, weights, generation."""

from .checkpoint import CheckpointError, load_model, save_model
from .config import ModelConfig
from .language_model import Mamba2LMHeadModel

__all__ = ["CheckpointError", "Mamba2LMHeadModel", "ModelConfig", "load_model", "save_model"]
