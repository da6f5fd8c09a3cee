"""Language models of Mamba-2 blocks: shape, weights, generation."""

from .checkpoint import CheckpointError, load_model, save_model
from .config import ModelConfig
from .generation import Decoder, generate
from .language_model import Mamba2LMHeadModel
from .sampling import Sampling

__all__ = [
    "CheckpointError",
    "Decoder",
    "Mamba2LMHeadModel",
    "ModelConfig",
    "Sampling",
    "generate",
    "load_model",
    "save_model",
]
