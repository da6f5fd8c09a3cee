"""The Mamba-2 architecture as modules around ssd_scan (paper, section 7)."""

from .attention import Attention
from .block import Block
from .cache import AttentionCache, Cache, MixerCache
from .layout import ProjectionLayout
from .mixer import Mamba2
from .mlp import GatedMLP
from .norm import GatedRMSNorm, RMSNorm
from .tokens import Tokens

__all__ = [
    "Attention",
    "AttentionCache",
    "Block",
    "Cache",
    "GatedMLP",
    "GatedRMSNorm",
    "Mamba2",
    "MixerCache",
    "ProjectionLayout",
    "RMSNorm",
    "Tokens",
]
