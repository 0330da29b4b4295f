"""A model's matrices as small integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..config import GPT2Config
from ..errors import ArgumentError
from ..ops.packed import QuantizedMatrix

GROUPS = {"int8": (64,), "int4": (32, 64)}
"""Inputs that may share a scale, by scheme; the first is the default."""


@dataclass(frozen=True)
class QuantizedWeights:
    """A model's matrices as integers, made by `quantize_weights`.

    Position embeddings, layer normalizations and biases are no part of it: they stay as they are.
    """

    scheme: str
    """int8 or int4."""
    group: int
    """Inputs that share a scale; matrices kept at 8 bits under int4 have groups of 64."""
    matrices: Mapping[str, QuantizedMatrix]
    """By the name of the parameter, each (inputs, outputs): embeddings stand transposed, and a tied
    output projection is the token embedding."""
    calibration: str
    """Description of the way the integers were found."""

    def bits_per_weight(self, config: GPT2Config) -> float:
        """Stored bits over all parameters: integers, their scales, and 32 for all the rest."""
        bits, counted = 0, 0
        for matrix in self.matrices.values():
            counted += matrix.q.numel()
            bits += matrix.bits * matrix.q.numel() + 16 * matrix.scales.numel()
        return (bits + 32 * (config.parameter_count - counted)) / config.parameter_count


def matrix_shapes(config: GPT2Config) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every matrix that is quantized, by name."""
    return {
        name: (shape[0], shape[1]) if name.startswith("h.") else (shape[1], shape[0])
        for name, shape in config.parameter_shapes().items()
        if len(shape) == 2 and name != "wpe.weight"
    }


def checked_group(scheme: str, group: int | None) -> int:
    """The scheme's group size: `group`, or its default."""
    if scheme not in GROUPS:
        raise ArgumentError(f"scheme={scheme!r:.80} is not one of {', '.join(GROUPS)}")
    allowed = GROUPS[scheme]
    if group is None:
        return allowed[0]
    if group not in allowed:
        raise ArgumentError(
            f"group_size={group!r:.80} is not one that {scheme} has: "
            f"{' or '.join(str(size) for size in allowed)}"
        )
    return group
