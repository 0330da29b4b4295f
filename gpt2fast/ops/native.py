"""The library of compiled CPU kernels (csrc): finding, building and loading it."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from ..kernels.library import (
    BUILT,
    INSTALLED,
    Library,
    build_library,
    find_library,
    is_switched_off,
    notice,
    opened,
)
from ..kernels.toolchain import CPU, Part, source_files, source_folder
from .backend import AVAILABILITY
from .support import Kernels

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of tensors that the CPU kernels read and write; they compute in float32."""
CACHE_DTYPES = (*DTYPES, torch.int8)
"""Dtypes of caches of packed models."""


_lock = threading.Lock()


@dataclass(frozen=True)
class Loaded:
    """The library whose kernels run."""

    library: Library
    isa: str
    """Instruction set: the name of a file in csrc/cpu/isa, such as avx512_bf16."""


# Set by the first call of `unavailable`; the reason is empty where there is a library.
_loaded: Loaded | None = None
_reason: str | None = None


def unavailable() -> str | None:
    """The reason that compiled kernels are unavailable, or None. The first call loads or builds
    them."""
    global _loaded, _reason
    if _reason is None:
        with _lock:
            if _reason is None:  # another thread was not faster
                try:
                    _loaded = _find_and_load()
                    _reason = ""
                except BackendError as error:
                    _reason = str(error)
                    if not is_switched_off():
                        notice(f"no compiled kernels, torch's operations run instead: {error}")
    return _reason or None


def loaded() -> Loaded | None:
    """The library that runs, or None if there is none: `unavailable()` says why."""
    unavailable()
    return _loaded


def _find_and_load() -> Loaded:
    library = find_library()
    try:
        return _load(library)
    except OSError as error:
        if library.origin != INSTALLED:
            raise BackendError(does_not_load(library, error)) from None
    # Built on another machine, for another C library: build it again here.
    library = build_library()
    try:
        return _load(library)
    except OSError as error:
        raise BackendError(does_not_load(library, error)) from None


def does_not_load(library: Library, error: OSError) -> str:
    # torch's error only names the file.
    reason = error.strerror or error.__cause__ or error
    return f"{library.path} ({library.origin}) does not load: {reason}"


# Descriptors stay open: a reused number would be a name that the loader takes for the first
# library.
_kept_open: list[int] = []


def load_library(library: Library, namespace: str, part: Part) -> None:
    """Load a library into the process, which registers its ops.

    Args:
        library: if it is in the cache, the very file that was checked is loaded.
        namespace: namespace of its ops.
        part: part of csrc that it was built from, whose sources list its ops.

    Raises:
        OSError: it does not load.
        BackendError: its ops are not those of this version.
    """
    descriptor = opened(library)
    if descriptor is None:
        torch.ops.load_library(library.path)
    else:
        _kept_open.append(descriptor)
        ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    ops = getattr(torch.ops, namespace)
    for name, arguments in _ops(part).items() if library.origin != BUILT else ():
        found = getattr(ops, name, None)
        if found is None or _arguments(found.default._schema) != arguments:
            lacks = "lacks the op" if found is None else "has another form of the op"
            raise BackendError(
                f"{library.path} ({library.origin}) {lacks} {namespace}::{name}: it is not a "
                "library of this version of gpt2fast; build it again, or leave it out"
            )


def _arguments(schema: Any) -> list[str]:
    """Names of an op's arguments, with a "!" behind those that it writes."""
    return [
        argument.name + "!" * bool(argument.alias_info and argument.alias_info.is_write)
        for argument in schema.arguments
    ]


def _ops(part: Part) -> dict[str, list[str]]:
    """The ops that the sources register, and their arguments; none where there are no sources."""
    try:
        files = source_files(source_folder(), part)
    except BackendError:
        return {}
    bindings = {"binding", "common"}
    text = "".join(path.read_text(encoding="utf-8") for path in files if bindings & {*path.parts})
    options = re.findall(r"OPTION\(\w+, (\w+), ", text)
    found = {}
    for name, literals, samples in re.findall(
        r'^GPT2FAST_OP\w*\(\s*(\w+),\s*((?:"[^"]*"\s*)+)(GPT2FAST_SAMPLING_NAMES)?\);', text, re.M
    ):
        names = "".join(re.findall(r'"([^"]*)"', literals)).split(", ")
        given = [argument.partition("=")[0] for argument in names if argument]
        found[name] = given + (options if samples else [])
    return found


def _load(library: Library) -> Loaded:
    load_library(library, "gpt2fast_native", CPU)
    try:
        return Loaded(library, torch.ops.gpt2fast_native.isa())
    except RuntimeError as error:  # GPT2FAST_ISA names none that this processor has
        raise BackendError(str(error).partition("\n")[0]) from None


AVAILABILITY["native"] = unavailable


def _wrong_device(tensor: Tensor) -> str | None:
    if tensor.is_cpu:
        return None
    return f"the native kernels run on the CPU, and a tensor is on {tensor.device}"


native = Kernels(
    "native kernels",
    DTYPES,
    lambda: unavailable(),
    _wrong_device,
    no_int8="the native kernels that use int8 caches are those of packed models",
)
"""The kernels in `torch.ops.gpt2fast_native`."""


def rows(x: Tensor) -> Tensor:
    """x as (rows, columns) for a kernel: a view where the columns are contiguous, else a copy."""
    if x.dim() != 2:
        x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """A number that changes when the contents of CPU tensors do; it takes one pass over them."""
    return torch.ops.gpt2fast_native.fingerprint([x.detach().contiguous() for x in tensors])
