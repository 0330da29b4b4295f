"""Weights as small integers: rounding, storage and simulation."""

from .quantize import quantize_weights
from .quantized import GROUPS, QuantizedWeights, matrix_shapes
from .simulation import round_activations, simulate
from .storage import from_tensors, is_quantized, to_tensors

__all__ = [
    "GROUPS",
    "QuantizedWeights",
    "from_tensors",
    "is_quantized",
    "matrix_shapes",
    "quantize_weights",
    "round_activations",
    "simulate",
    "to_tensors",
]
