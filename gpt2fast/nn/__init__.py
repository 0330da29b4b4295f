"""Modules of GPT-2 on fused ops, for any model."""

from .modules import (
    GELUMLP,
    Block,
    CausalSelfAttention,
    LayerNorm,
    LinearCrossEntropy,
    Projection,
    ResidualLayerNorm,
)

__all__ = [
    "Block",
    "CausalSelfAttention",
    "GELUMLP",
    "LayerNorm",
    "LinearCrossEntropy",
    "Projection",
    "ResidualLayerNorm",
]
