"""The ops: one meaning each, several implementations (see `gpt2fast.ops.backend`)."""

from .attention import attention, attention_with_cache, causal_attention
from .cache import append_to_cache, release_rows, reorder_cache
from .cross_entropy import linear_cross_entropy
from .decode import decode_step, packed_next, packed_step
from .embedding import embedding
from .layer_norm import residual_layer_norm
from .mlp import bias_gelu, gelu_mlp
from .optimizer import fused_adamw
from .projection import projection
from .sampling import sample

__all__ = [
    "append_to_cache",
    "attention",
    "attention_with_cache",
    "bias_gelu",
    "causal_attention",
    "decode_step",
    "embedding",
    "fused_adamw",
    "gelu_mlp",
    "linear_cross_entropy",
    "packed_next",
    "packed_step",
    "projection",
    "release_rows",
    "reorder_cache",
    "residual_layer_norm",
    "sample",
]
