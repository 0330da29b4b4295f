"""Quantized weights as tensors of a safetensors file, and back.

A matrix NAME (K, N) is two tensors: `NAME.scales`, float16 (ceil(K / group), N), and `NAME.q`:

    8 bits    int8 (K, N), from -127 to 127
    4 bits    uint8 (ceil(K / 2), N), each byte q + 8 of inputs 2i (low half) and 2i + 1 (high half)

An odd K is padded with q = 0. Embeddings stand transposed, (width, vocabulary); a tied output
projection is stored once, as `wte.weight`. The file's metadata say the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import GPT2Config
from ..errors import ArgumentError, WeightsError
from ..ops.packed import QuantizedMatrix
from .quantized import GROUPS, QuantizedWeights, checked_group, matrix_shapes
from .rounding import RANGE

VERSION = "1"
_KEYS = ("version", "scheme", "group", "bits_per_weight", "calibration")
_PREFIX = "quantization."


def to_tensors(
    quantized: QuantizedWeights, config: GPT2Config
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata for a file of quantized weights.

    Args:
        quantized: the matrices.
        config: shape of the model that they belong to.

    Returns:
        For each matrix its integers `NAME.q` and their `NAME.scales`, and the file's metadata.
    """
    tensors: dict[str, Tensor] = {}
    for name, matrix in quantized.matrices.items():
        tensors[f"{name}.q"] = _halves(matrix.q) if matrix.bits == 4 else matrix.q
        tensors[f"{name}.scales"] = matrix.scales
    values = (
        VERSION,
        quantized.scheme,
        str(quantized.group),
        f"{quantized.bits_per_weight(config):.4f}",
        quantized.calibration,
    )
    return tensors, {_PREFIX + key: value for key, value in zip(_KEYS, values, strict=True)}


def is_quantized(metadata: Mapping[str, str]) -> bool:
    """True for the metadata of a file of quantized weights."""
    return _PREFIX + "version" in metadata


def from_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: GPT2Config, source: str
) -> QuantizedWeights:
    """The inverse of `to_tensors`; tensors of other names are left to the caller.

    Args:
        tensors: all tensors of the file.
        metadata: of the file.
        config: of the model that the weights belong to.
        source: the file's name, for the error message.

    Raises:
        WeightsError: something is missing, unexpected, of another shape or dtype, or out of range.
    """
    scheme, group = _scheme(metadata, source)
    shapes = matrix_shapes(config)
    expected = {f"{name}.{part}" for name in shapes for part in ("q", "scales")}
    found = {name for name in tensors if name.endswith((".q", ".scales"))}
    for problem, names in (("lacks", expected - found), ("has", found - expected)):
        if names:
            raise WeightsError(
                f"{source} {problem} {len(names)} tensors that a quantized model of this "
                f"configuration {'needs' if problem == 'lacks' else 'does not have'}, such as "
                f"{min(names):.80}; check that config.json belongs to these weights"
            )
    matrices = {
        name: _matrix(name, tensors, shape, scheme, group, source) for name, shape in shapes.items()
    }
    note = metadata.get(_PREFIX + "calibration", "unknown")
    return QuantizedWeights(scheme, group, matrices, note)


def _scheme(metadata: Mapping[str, str], source: str) -> tuple[str, int]:
    version = metadata.get(_PREFIX + "version")
    if version != VERSION:
        raise WeightsError(
            f"{source}: version {version!r:.80} of the quantized format cannot be read, only "
            f"{VERSION}; quantize the original checkpoint with this version of gpt2fast"
        )
    scheme = metadata.get(_PREFIX + "scheme", "")
    group = metadata.get(_PREFIX + "group", "")
    try:
        return scheme, checked_group(
            scheme, int(group) if group.isascii() and group.isdigit() else -1
        )
    except ArgumentError as error:
        raise WeightsError(
            f"{source}: the metadata of its quantized weights are damaged: {error}"
        ) from None


def _matrix(
    name: str,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, int],
    scheme: str,
    group: int,
    source: str,
) -> QuantizedMatrix:
    inputs, outputs = shape
    q, scales = tensors[f"{name}.q"], tensors[f"{name}.scales"]
    bits = 4 if scheme == "int4" and q.dtype == torch.uint8 else 8
    if bits == 8:
        group = GROUPS["int8"][0]
    rows = inputs if bits == 8 else -(-inputs // 2)
    wanted = {
        f"{name}.q": (q, torch.int8 if bits == 8 else torch.uint8, (rows, outputs)),
        f"{name}.scales": (scales, torch.float16, (-(-inputs // group), outputs)),
    }
    for part, (tensor, dtype, size) in wanted.items():
        if tensor.dtype != dtype or tensor.shape != size:
            raise WeightsError(
                f"{source}: {part} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {size}; "
                "check that config.json belongs to these weights, or quantize the original again"
            )
    if bits == 4:
        q = _whole(q, inputs)
    elif int(q.min()) < RANGE[8][0]:
        raise WeightsError(
            f"{source}: {name}.q has {int(q.min())}, outside {RANGE[8][0]} .. {RANGE[8][1]}; the "
            "file is damaged: quantize the original again"
        )
    if not scales.isfinite().all():
        raise WeightsError(
            f"{source}: {name}.scales has a value that is not finite; the file is damaged: "
            "quantize the original again"
        )
    return QuantizedMatrix(q, scales, bits, group)


def _halves(q: Tensor) -> Tensor:
    """(K, N) int8 in -8 .. 7 -> (ceil(K / 2), N) uint8."""
    shifted = (F.pad(q, (0, 0, 0, len(q) % 2)) + 8).to(torch.uint8)
    return shifted[0::2] | (shifted[1::2] << 4)


def _whole(packed: Tensor, inputs: int) -> Tensor:
    """(ceil(K / 2), N) uint8 -> (K, N) int8."""
    halves = torch.stack([packed & 15, packed >> 4], dim=1).flatten(0, 1)
    return halves[:inputs].to(torch.int8).sub_(8)
