"""Weights as small integers times a scale for each group of inputs.

    weight[k, n] ~ q[k, n] * scale[k // group, n]

Scales are float16; every integer is chosen for its scale as it is stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import WeightsError
from ..ops.packed import QuantizedMatrix

RANGE = {8: (-127, 127), 4: (-8, 7)}
"""Smallest and largest integer, by bits."""

# Columns rounded at once: an embedding is never held in float32 as a whole.
_COLUMNS = 4096


def round_to_nearest(weight: Tensor, bits: int, group: int) -> QuantizedMatrix:
    """Round each weight to the nearest integer; the largest of a group is at the end of the range.

    Args:
        weight: (K, N), any floating-point dtype.
        bits: 8 or 4.
        group: inputs that share a scale.
    """
    inputs, outputs = weight.shape
    q = torch.empty(inputs, outputs, dtype=torch.int8)
    scales = torch.empty(-(-inputs // group), outputs, dtype=torch.float16)
    for begin in range(0, outputs, _COLUMNS):
        columns = slice(begin, begin + _COLUMNS)
        part = F.pad(weight[:, columns].detach().float(), (0, 0, 0, -inputs % group))
        groups = part.unflatten(0, (-1, group))
        steps = stored(groups.abs().amax(1) / RANGE[bits][1])
        q[:, columns] = integers(groups, steps[:, None], bits).flatten(0, 1)[:inputs]
        scales[:, columns] = steps
    return QuantizedMatrix(q, scales, bits, group)


def integers(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The integers nearest to `weight / scales`, as floats; 0 where the scale is."""
    return (weight * inverse(scales)).round_().clamp_(*RANGE[bits])


def inverse(scales: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is."""
    return torch.where(scales == 0, 0.0, 1.0 / scales)


def stored(scales: Tensor) -> Tensor:
    """The values that float16 keeps of `scales`.

    Raises:
        WeightsError: one is beyond float16.
    """
    kept = scales.half()
    if not kept.isfinite().all():
        raise WeightsError(
            f"the weights cannot be quantized: a scale of {float(scales.abs().max()):.3g} is "
            "beyond float16's largest, 65504, or not a number; look for what is wrong with the "
            "weights, or keep them in float32"
        )
    return kept.float()
