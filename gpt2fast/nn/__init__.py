"""Modules of GPT-2 on fused ops, for any model (Radford et al., 2019, section 2.3).

Constructor arguments are plain sizes; parameters carry the names of GPT-2's checkpoints, and
projections are stored (in, out) as there.
"""

from .attention import CausalSelfAttention, SelfAttention
from .block import Block
from .cross_entropy import LinearCrossEntropy
from .layer_norm import LayerNorm, ResidualLayerNorm
from .mlp import GELUMLP
from .output_projection import OutputProjection
from .projection import Projection

__all__ = [
    "Block",
    "CausalSelfAttention",
    "GELUMLP",
    "LayerNorm",
    "LinearCrossEntropy",
    "OutputProjection",
    "Projection",
    "ResidualLayerNorm",
    "SelfAttention",
]
