"""Packing the weights of a GPT2: to keep the result, or to decode with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..errors import ArgumentError
from ..model import GPT2
from ..nn.changes import on_moved_weights
from ..nn.inputs import check_held
from ..nn.projection import merged
from ..ops.backend import requested_backend
from ..ops.native import fingerprint, unavailable
from ..ops.packed import DTYPES, Matrix, MatrixFormat, PackedWeights
from ..quantization import QuantizedWeights, quantize_weights
from .packed import PackedGPT2, model_shape
from .structure import why_not_read


@dataclass
class _Copy:
    """Packed weights of a model, and the state of its parameters that they were made from."""

    state: list[tuple[int, int]]
    """Each parameter's address, and torch's count of its changes."""
    digest: int
    """Hash of the parameters' bytes."""
    packed: PackedGPT2


_copies: WeakKeyDictionary[nn.Module, _Copy] = WeakKeyDictionary()
"""Copies that generation made by itself, by model."""


def can_be_packed(model: GPT2) -> bool:
    """True if there are kernels here that read packed weights of this model."""
    if requested_backend() not in ("auto", "native") or _why_not_packed(model) is not None:
        return False
    # Last: it compiles the CPU's kernels where they are not there yet.
    return unavailable() is None


def _why_not_packed(model: GPT2) -> str | None:
    if model.device.type != "cpu":
        return f"it is on {model.device}; move it with .cpu()"
    if is_fake(next(model.parameters())):
        return "its weights are fake, of which there are shapes alone"
    if model.dtype not in DTYPES:
        return f"it is in {model.dtype}; use .float(), .half() or .bfloat16()"
    return why_not_read(model)


def packed_copy(model: GPT2, *, thorough: bool) -> PackedGPT2 | None:
    """The packed copy of a model's current weights, or None where kernels cannot use it.

    Args:
        model: the copy is kept for as long as it.
        thorough: hash the weights, since torch's count of their changes misses changes through
            `parameter.data`.
    """
    if torch.compiler.is_compiling() or not can_be_packed(model):
        return None
    state, known = _state(model), _copies.get(model)
    digest = known.digest if known is not None and known.state == state and not thorough else None
    if digest is None:
        digest = fingerprint(list(model.parameters()))
    if known is None or known.digest != digest:
        known = _Copy(state, digest, pack_weights(model))
    known.state = state
    _copies[model] = known
    return known.packed


def _state(model: nn.Module) -> list[tuple[int, int]]:
    return [
        (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
        for parameter in model.parameters()
    ]


@on_moved_weights
def _forget_copy(model: nn.Module) -> None:
    known = _copies.get(model)
    if known is not None and known.state != _state(model):
        del _copies[model]


@contextmanager
def keeping_no_copy(model: GPT2) -> Iterator[None]:
    """Discard a packed copy that is made inside, so that it takes no memory afterward."""
    before = _copies.get(model)
    try:
        yield
    finally:
        if before is None:
            _copies.pop(model, None)
        else:
            _copies[model] = before


def pack(model: GPT2, *, release: bool = False) -> PackedGPT2:
    """The implementation of `GPT2.pack`."""
    check_held(model.wte)
    reason = _why_not_packed(model)
    if reason is not None:
        raise ArgumentError(f"this model cannot be packed: {reason}")
    _copies.pop(model, None)
    return pack_weights(model, release=release)


def quantize(model: GPT2, scheme: str, *, release: bool = False, **options: Any) -> PackedGPT2:
    """The implementation of `GPT2.quantize`."""
    if model.device.type not in ("cpu", "meta"):
        raise ArgumentError(
            f"quantized weights run on the CPU, and the model is on {model.device}; "
            "move it with .cpu() first"
        )
    check_held(model.wte)
    if reason := why_not_read(model):
        raise ArgumentError(f"this model cannot be quantized: {reason}")
    quantized = quantize_weights(model, scheme, **options)
    _copies.pop(model, None)
    return pack_weights(model, quantized, release=release)


def pack_weights(
    model: GPT2, quantized: QuantizedWeights | None = None, *, release: bool = False
) -> PackedGPT2:
    """Pack a model's weights, even where no kernels can read them.

    Args:
        model: on the CPU; adapters are merged.
        quantized: matrices to use instead of the model's.
        release: free each parameter of `model` as soon as it is packed; the model can only be
            thrown away afterward.
    """
    matrices = quantized.matrices if quantized is not None else {}
    shape = model_shape(model.config)
    plain = merged(model)
    if release and plain is not model:
        for parameter in model.parameters():  # what `plain` shares stays with it
            parameter.data = parameter.data.new_empty(0)
    parameters = dict(plain.named_parameters())
    formats = {
        name: MatrixFormat.of(matrices.get(name, parameters[name])) for name in shape.matrices()
    }
    weights = PackedWeights(shape, formats)
    for name, parameter in parameters.items():
        value: Matrix = matrices.get(name, parameter.detach())
        if name in ("wte.weight", "lm_head.weight") and isinstance(value, Tensor):
            value = value.t()
        weights.put(name, value)
        if release:
            parameter.data = parameter.data.new_empty(0)
    packed = PackedGPT2(
        model.config, weights, None if quantized is None else replace(quantized, matrices={})
    )
    packed.generation_config = dict(model.generation_config)
    return packed
