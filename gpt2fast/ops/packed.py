"""Packed weights: a whole model as one block of memory in the order in which a step reads it.

The block, the arena, begins with a header of 64-bit words (`csrc/cpu/step.h` has the same structs)
and holds every matrix as panels of 32 output columns:

    float32    [panel][input][32]
    bfloat16   [panel][input / 2][32][2]
    float16    [panel][input][32]
    int8       [panel][group] of 32 float16 scales, then [input / 4][32][4] bytes of q + 128
    int4       [panel][group] of 32 float16 scales, then [input / 8][32][4] bytes: q + 8 of inputs
               8i + j in the low half, of 8i + 4 + j in the high one

A quantized weight is q * scale; each group of inputs has one scale a column. Incomplete groups
and panels are padded with zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .._system.memory import zeros
from ..config import BLOCK_MATRICES, BLOCK_PARAMETERS, block_shapes
from ..errors import ArgumentError
from .activations import ACTIVATIONS

_PANEL = 32
_MAGIC = int.from_bytes(b"gt2fast1", "little")
_FORMATS = ("float32", "bfloat16", "int8", "int4", "float16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of matrices that are packed as they are."""
_FLOAT16_END = 65520.0
"""From here on float16 rounds to infinity; its largest number is 65504."""
_GROUPS = (32, 64)
"""Sizes of groups that the kernels can read."""
_ACTIVATIONS = tuple(ACTIVATIONS)
_ALIGNMENT = 4096
_MATRIX_WORDS = 8
_MODEL_WORDS = 14 + 2 * _MATRIX_WORDS
_LAYER_WORDS = 5 + 4 * _MATRIX_WORDS
# Panels packed at once: few, so that temporary copies stay small.
_CHUNK = 64


@dataclass(frozen=True)
class QuantizedMatrix:
    """A weight matrix (inputs, outputs) as small integers, with scales for groups of inputs."""

    q: Tensor
    """(K, N) int8: in [-127, 127] for 8 bits, [-8, 7] for 4."""
    scales: Tensor
    """(ceil(K / group), N) float16."""
    bits: int
    """8 or 4."""
    group: int
    """Inputs that share a scale."""

    def dequantize(self) -> Tensor:
        """(K, N) float32."""
        scales = self.scales.float().repeat_interleave(self.group, dim=0)
        return self.q.float() * scales[: len(self.q)]


Matrix = Tensor | QuantizedMatrix


@dataclass(frozen=True)
class MatrixFormat:
    """Storage format of a matrix's elements."""

    name: str
    """float32, bfloat16, float16, int8 or int4."""
    group: int = 0
    """Inputs that share a scale; 0 without quantization."""

    @classmethod
    def of(cls, matrix: Matrix) -> MatrixFormat:
        """The format that holds `matrix` as it is; float64 becomes float32."""
        if isinstance(matrix, QuantizedMatrix):
            return cls(f"int{matrix.bits}", matrix.group)
        return cls(str(matrix.dtype if matrix.dtype in DTYPES else torch.float32)[6:])

    @property
    def neighbors(self) -> int:
        """Inputs of one column that lie side by side, of float formats."""
        return 2 if self.name == "bfloat16" else 1

    def padded(self, inputs: int) -> int:
        """`inputs` rounded up to whole groups, or to an even number in 16 bits."""
        unit = self.group or (1 if self.name == "float32" else 2)
        return -(-inputs // unit) * unit

    def panel_size(self, inputs: int) -> int:
        """Bytes of a panel."""
        padded = self.padded(inputs)
        bits = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}[self.name]
        scales = 2 * (padded // self.group) if self.group else 0
        return _PANEL * (padded * bits // 8 + scales)


@dataclass(frozen=True)
class ModelShape:
    """A model's shape as the arena's header describes it."""

    n_head: int
    width: int
    inner_width: int
    vocab_size: int
    n_positions: int
    activation: str
    eps: float
    scales: tuple[float, ...]
    """Factor on the attention scores of each layer."""
    tied: bool
    """True if the token embedding is also the output projection."""

    def matrices(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of every matrix by name; embeddings stand transposed."""
        sizes = {"wte.weight": (self.width, self.vocab_size)}
        if not self.tied:
            sizes["lm_head.weight"] = (self.width, self.vocab_size)
        block = block_shapes(self.width, self.inner_width)
        for layer in range(len(self.scales)):
            for name in BLOCK_MATRICES:
                inputs, outputs = block[name]
                sizes[f"h.{layer}.{name}"] = inputs, outputs
        return sizes

    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Shape of everything that is stored in float32, by name."""
        shapes: dict[str, tuple[int, ...]] = {"wpe.weight": (self.n_positions, self.width)}
        # Norms first, then biases of projections: the order in the arena.
        vectors = [name for name in BLOCK_PARAMETERS if name not in BLOCK_MATRICES]
        vectors.sort(key=lambda name: not name.startswith("ln_"))
        block = block_shapes(self.width, self.inner_width)
        for layer in range(len(self.scales)):
            shapes |= {f"h.{layer}.{name}": block[name] for name in vectors}
        shapes["ln_f.weight"] = shapes["ln_f.bias"] = (self.width,)
        return shapes


class PackedWeights:
    """Memory for a model's packed weights, to be filled with `put`.

    Args:
        shape: of the model.
        formats: the format of every matrix of `shape.matrices()`. Groups have 32 or 64 inputs; the
            last one of a matrix may have fewer.

    Raises:
        ArgumentError: the activation, or a format, cannot be packed.
    """

    def __init__(self, shape: ModelShape, formats: Mapping[str, MatrixFormat]):
        if shape.activation not in _ACTIVATIONS:
            raise ArgumentError(
                f"activation {shape.activation!r} cannot be packed; "
                f"these can: {', '.join(_ACTIVATIONS)}"
            )
        header_words = self._lay_out(shape, formats)
        self.arena = zeros((self._size,), torch.uint8, "cpu")
        """(bytes,) uint8."""
        header = self._header()
        assert len(header) == header_words
        self.arena[: 8 * header_words] = torch.tensor(header, dtype=torch.int64, device="cpu").view(
            torch.uint8
        )

    @classmethod
    def from_arena(cls, arena: Tensor) -> PackedWeights:
        """The weights in an arena that `PackedWeights` made.

        Raises:
            ArgumentError: it holds no packed weights, or its header contradicts itself.
        """
        check_arena(arena)
        words = arena[: len(arena) // 8 * 8].view(torch.int64).cpu()
        if len(words) < _MODEL_WORDS or words[0] != _MAGIC or words[1] != len(arena):
            raise ArgumentError("this tensor is not an arena of packed weights")
        try:
            self = cls._read(words)
        except (ArgumentError, IndexError, KeyError, OverflowError, RuntimeError, ValueError) as e:
            raise ArgumentError(f"these packed weights are damaged: {e}") from None
        header = self._header()
        if self._size != len(arena) or words[: len(header)].tolist() != header:
            raise ArgumentError("these packed weights are damaged: their header contradicts itself")
        self.arena = arena
        return self

    @classmethod
    def _read(cls, words: Tensor) -> PackedWeights:
        """The weights that a header describes, without memory; the header has not been checked."""
        layers, heads, _, width, inner, vocab, positions, activation, eps = words[2:11].tolist()
        if min(layers, heads, width, inner, vocab, positions) < 1 or width % heads:
            raise ArgumentError("a size in their header is impossible")
        if len(words) < _MODEL_WORDS + layers * _LAYER_WORDS:
            raise ArgumentError("their header is cut off")
        tied = words[14:22].equal(words[22:30])
        table = words[_MODEL_WORDS : _MODEL_WORDS + layers * _LAYER_WORDS].view(layers, -1)
        shape = ModelShape(
            heads, width, inner, vocab, positions, _named(_ACTIVATIONS, activation), _to_float(eps),
            tuple(_to_float(scale) for scale in table[:, 4].tolist()), tied,
        )  # fmt: skip
        found = [words[14:22]] if tied else [words[14:22], words[22:30]]
        found += list(table[:, 5:].reshape(-1, _MATRIX_WORDS))
        names = [name for name in shape.matrices() if name[0] != "h"]
        names += [name for name in shape.matrices() if name[0] == "h"]
        self = cls.__new__(cls)
        self._lay_out(
            shape,
            {
                name: MatrixFormat(_named(_FORMATS, int(matrix[0])), int(matrix[4]))
                for name, matrix in zip(names, found, strict=True)
            },
        )
        return self

    def _lay_out(self, shape: ModelShape, formats: Mapping[str, MatrixFormat]) -> int:
        """Assign every weight its place; returns the header's size in words."""
        self.shape = shape
        self.formats = dict(formats)
        self._sizes = shape.matrices()
        for name in self._sizes:
            _check_format(name, self.formats[name])
        self._offsets: dict[str, int] = {}
        header_words = _MODEL_WORDS + len(shape.scales) * _LAYER_WORDS
        end = _aligned(8 * header_words)
        for name, dims in shape.vectors().items():
            self._offsets[name] = end
            elements = torch.Size(dims).numel()
            # Kernels read it in whole panels.
            end = _aligned(end + 4 * (-(-elements // _PANEL) * _PANEL), 64)
        for name, (inputs, outputs) in self._sizes.items():
            end = self._offsets[name] = _aligned(end)
            end += self.formats[name].panel_size(inputs) * _panels(outputs)
        self._size = _aligned(end)
        return header_words

    @property
    def matrix_names(self) -> list[str]:
        """Every matrix, in the order of the arena."""
        return list(self._sizes)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes that a step for one token reads of the weights."""
        read = [name for name in self._sizes if self.shape.tied or name != "wte.weight"]
        return sum(
            self.formats[name].panel_size(self._sizes[name][0]) * _panels(self._sizes[name][1])
            for name in read
        )

    def put(self, name: str, value: Matrix) -> None:
        """Store a vector, wpe, or a matrix (in, out) in its format from `formats`.

        Raises:
            ArgumentError: a matrix has another format or shape, or numbers too large for it.
        """
        if name not in self._sizes:
            self._floats(name).copy_(value if isinstance(value, Tensor) else value.dequantize())
            return
        form = self.formats[name]
        given = MatrixFormat.of(value)
        if given != form and form.group:
            raise ArgumentError(f"{name} was announced as {form}, not {given}")
        _check_matrix(name, value, *self._sizes[name])
        if form.name == "float16" and (found := beyond_float16(value)) is not None:
            raise ArgumentError(
                f"{name} holds {found:g}, and float16 ends at 65504: pack it as float32 or bfloat16"
            )
        for panels, begin, end in self._chunks(name):
            panels.copy_(_pack(_columns(value, begin, end), form))

    def get(self, name: str) -> Matrix:
        """The stored weight: a float32 vector, or a matrix (in, out) in its format."""
        if name not in self._sizes:
            return self._floats(name).clone()
        inputs, _ = self._sizes[name]
        form = self.formats[name]
        parts = [
            _unpack(panels, form, inputs, end - begin) for panels, begin, end in self._chunks(name)
        ]
        if form.group:
            return QuantizedMatrix(
                torch.cat([part.q for part in parts], 1),  # type: ignore[union-attr]
                torch.cat([part.scales for part in parts], 1),  # type: ignore[union-attr]
                8 if form.name == "int8" else 4,
                form.group,
            )
        return torch.cat(parts, 1)  # type: ignore[arg-type]

    def columns(self, name: str, columns: Tensor) -> Tensor:
        """(in, C) float32: some columns of a matrix, without unpacking the others.

        Args:
            name: of the matrix.
            columns: (C,) int64.
        """
        inputs, outputs = self._sizes[name]
        form = self.formats[name]
        size, begin = form.panel_size(inputs), self._offsets[name]
        panels = self.arena[begin : begin + _panels(outputs) * size].view(-1, size)
        needed, place = (columns // _PANEL).unique(return_inverse=True)
        found = _unpack(panels[needed], form, inputs, len(needed) * _PANEL)
        values = found.dequantize() if isinstance(found, QuantizedMatrix) else found.float()
        return values[:, place * _PANEL + columns % _PANEL]

    def _floats(self, name: str) -> Tensor:
        dims = self.shape.vectors()[name]
        begin = self._offsets[name]
        size = 4 * torch.Size(dims).numel()
        return self.arena[begin : begin + size].view(torch.float32).view(dims)

    def _chunks(self, name: str) -> Iterator[tuple[Tensor, int, int]]:
        """Yield some panels (P, bytes) at a time, with the columns that they hold."""
        inputs, outputs = self._sizes[name]
        size = self.formats[name].panel_size(inputs)
        count = _panels(outputs)
        begin = self._offsets[name]
        panels = self.arena[begin : begin + count * size].view(count, size)
        for first in range(0, count, _CHUNK):
            last = min(first + _CHUNK, count)
            yield panels[first:last], first * _PANEL, min(last * _PANEL, outputs)

    def _header(self) -> list[int]:
        shape = self.shape
        at = self._offsets
        embedding = self._matrix_words("wte.weight")
        words = [
            _MAGIC,
            self._size,
            len(shape.scales),
            shape.n_head,
            shape.width // shape.n_head,
            shape.width,
            shape.inner_width,
            shape.vocab_size,
            shape.n_positions,
            _ACTIVATIONS.index(shape.activation),
            _double(shape.eps),
            at["wpe.weight"],
            at["ln_f.weight"],
            at["ln_f.bias"],
            *embedding,
            *(embedding if shape.tied else self._matrix_words("lm_head.weight")),
        ]
        for layer, scale in enumerate(shape.scales):
            block = f"h.{layer}."
            words += [at[f"{block}{norm}"] for norm in ("ln_1.weight", "ln_1.bias")]
            words += [at[f"{block}{norm}"] for norm in ("ln_2.weight", "ln_2.bias")]
            words.append(_double(scale))
            for matrix in BLOCK_MATRICES:
                words += self._matrix_words(block + matrix)
        return words

    def _matrix_words(self, name: str) -> list[int]:
        inputs, outputs = self._sizes[name]
        form = self.formats[name]
        return [
            _FORMATS.index(form.name),
            inputs,
            form.padded(inputs),
            outputs,
            form.group,
            self._offsets[name],
            form.panel_size(inputs),
            self._offsets.get(name.replace(".weight", ".bias"), -1) if name[0] == "h" else -1,
        ]


def beyond_float16(values: Matrix) -> float | None:
    """A finite number among `values` that float16 would turn into infinity, or None."""
    if isinstance(values, QuantizedMatrix) or values.dtype == torch.float16 or not values.numel():
        return None
    least, most = (float(x) for x in values.detach().aminmax())
    if least > -_FLOAT16_END and most < _FLOAT16_END:
        return None
    found = values[values.isfinite() & (values.abs() >= _FLOAT16_END)]
    return float(found[0]) if found.numel() else None


def check_arena(arena: Tensor) -> None:
    """Check that a tensor can hold packed weights: flat, contiguous, uint8, aligned.

    Raises:
        ArgumentError: it cannot.
    """
    if arena.dtype != torch.uint8 or arena.dim() != 1 or not arena.is_contiguous():
        raise ArgumentError(
            f"packed weights are a contiguous (bytes,) uint8 tensor, not {arena.dtype} "
            f"{tuple(arena.shape)} with strides {arena.stride()}"
        )
    held = arena.untyped_storage().nbytes()
    if arena.storage_offset() + arena.numel() > held:
        raise ArgumentError(
            f"the packed weights' storage holds {held} of {arena.numel()} bytes: it was resized"
        )
    if arena.data_ptr() % 16:
        raise ArgumentError("packed weights must begin at an address that 16 divides; clone them")


def _check_format(name: str, form: MatrixFormat) -> None:
    if form.name not in _FORMATS:
        raise ArgumentError(
            f"{name} cannot be packed as {form.name}; these can: {', '.join(_FORMATS)}"
        )
    if form.group not in (_GROUPS if form.name.startswith("int") else (0,)):
        groups = " or ".join(map(str, _GROUPS))
        raise ArgumentError(
            f"{name} cannot be packed as {form.name} in groups of {form.group}: int8 and int4 have "
            f"groups of {groups} inputs, the other formats none"
        )


def _check_matrix(name: str, matrix: Matrix, inputs: int, outputs: int) -> None:
    values = matrix.q if isinstance(matrix, QuantizedMatrix) else matrix
    if values.shape != (inputs, outputs):
        raise ArgumentError(f"{name} is {tuple(values.shape)}, not ({inputs}, {outputs})")
    if not isinstance(matrix, QuantizedMatrix):
        return
    groups = -(-inputs // matrix.group)
    if matrix.scales.shape != (groups, outputs) or matrix.scales.dtype != torch.float16:
        raise ArgumentError(
            f"{name} has {matrix.scales.dtype} scales {tuple(matrix.scales.shape)}; {inputs} "
            f"inputs in groups of {matrix.group} have float16 ones ({groups}, {outputs})"
        )
    if values.dtype != torch.int8:
        raise ArgumentError(f"{name} holds {values.dtype} and not the int8 of a quantized matrix")
    if matrix.bits == 4 and values.numel():
        least, most = (int(x) for x in values.aminmax())
        if least < -8 or most > 7:
            raise ArgumentError(
                f"{name} holds integers from {least} to {most}; 4 bits hold those from -8 to 7"
            )


def _named(names: Sequence[str], index: int) -> str:
    if not 0 <= index < len(names):
        raise ArgumentError(f"{index} stands for none of {', '.join(names)}")
    return names[index]


def _panels(outputs: int) -> int:
    return -(-outputs // _PANEL)


def _aligned(offset: int, to: int = _ALIGNMENT) -> int:
    return -(-offset // to) * to


def _double(x: float) -> int:
    """The bits of a float64, as an int64."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _to_float(bits: int) -> float:
    """The float64 that has these bits."""
    return struct.unpack("<d", struct.pack("<q", bits))[0]


def _columns(matrix: Matrix, begin: int, end: int) -> Matrix:
    if isinstance(matrix, QuantizedMatrix):
        return QuantizedMatrix(
            matrix.q[:, begin:end], matrix.scales[:, begin:end], matrix.bits, matrix.group
        )
    return matrix[:, begin:end]


def _pack(matrix: Matrix, form: MatrixFormat) -> Tensor:
    """Columns of a matrix as panels (P, bytes)."""
    values = matrix.q if isinstance(matrix, QuantizedMatrix) else matrix.detach()
    inputs, outputs = values.shape
    count, padded = _panels(outputs), form.padded(inputs)
    if not isinstance(matrix, QuantizedMatrix):
        values = values.to(getattr(torch, form.name))
    values = F.pad(values, (0, count * _PANEL - outputs, 0, padded - inputs))
    if not isinstance(matrix, QuantizedMatrix):
        unit = form.neighbors
        words = values.view(padded // unit, unit, count, _PANEL).permute(2, 0, 3, 1)
        return words.reshape(count, -1).view(torch.uint8)
    groups, group = padded // form.group, form.group
    if form.name == "int8":
        stored = (values.short() + 128).to(torch.uint8).view(groups, group // 4, 4, count, _PANEL)
    else:
        halves = (values + 8).to(torch.uint8).view(groups, group // 8, 2, 4, count, _PANEL)
        stored = halves[:, :, 0] | (halves[:, :, 1] << 4)
    words = stored.permute(3, 0, 1, 4, 2).reshape(count, groups, -1)
    scales = F.pad(matrix.scales, (0, count * _PANEL - outputs))
    scales = scales.view(groups, count, _PANEL).transpose(0, 1).contiguous().view(torch.uint8)
    return torch.cat([scales, words], 2).view(count, -1)


def _unpack(panels: Tensor, form: MatrixFormat, inputs: int, outputs: int) -> Matrix:
    """The inverse of `_pack`."""
    count, padded = len(panels), form.padded(inputs)
    if not form.group:
        words = panels.view(getattr(torch, form.name))
        unit = form.neighbors
        words = words.view(count, padded // unit, _PANEL, unit).permute(1, 3, 0, 2)
        return words.reshape(padded, -1)[:inputs, :outputs]
    groups, group = padded // form.group, form.group
    blocks = panels.view(count, groups, -1)
    scales = blocks[:, :, : 2 * _PANEL].contiguous().view(torch.float16)
    stored = blocks[:, :, 2 * _PANEL :].reshape(count, groups, -1, _PANEL, 4)
    if form.name == "int8":
        values = (stored.short() - 128).to(torch.int8).permute(1, 2, 4, 0, 3)
    else:
        halves = torch.stack([stored & 15, stored >> 4], dim=3).to(torch.int8) - 8
        values = halves.permute(1, 2, 3, 5, 0, 4)
    return QuantizedMatrix(
        values.reshape(groups * group, -1)[:inputs, :outputs].contiguous(),
        scales.transpose(0, 1).reshape(groups, -1)[:, :outputs].contiguous(),
        8 if form.name == "int8" else 4,
        form.group,
    )
