"""One place that defines ops and decides which implementation of an op runs.

Every op has one schema and several implementations, tried in the order of `ORDER`:

    native      compiled kernels from csrc
    triton      Triton kernels
    torch       torch's own fused or cache-friendly operations
    reference   the plain torch expression that says what the op means

`backend("auto")`, the default, takes the first that can run the call; any other name forces one,
and a call that the forced one cannot run raises `BackendError` with the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import _C, Tensor
from torch._library.autograd import Info, make_autograd_impl

from ..errors import ArgumentError, BackendError
from .derivatives import (
    differentiated,
    is_transformed,
    outside_autocast,
    refused,
    tensors_in,
    wants_graph,
)
from .requirements import Memory

ORDER = ("native", "triton", "torch", "reference")
AVAILABILITY: dict[str, Callable[[], str | None]] = {}
"""Of backends that not every machine has: why there is none here, or None."""


@dataclass(frozen=True)
class Call:
    """One call of an op: what ran it, and what was passed over."""

    op: str
    backend: str
    refused: tuple[tuple[str, str], ...]
    """Each backend tried before, and why it could not run the call."""


_LIBRARY = torch.library.Library("gpt2fast", "DEF")
# One choice for the whole process: autograd runs backward passes in threads of its own.
_requested = "auto"


class _Thread(threading.local):
    checked = False
    """Whether the arguments of ops that are called now have been checked."""


_thread = _Thread()
_records: list[list[Call]] = []


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op."""

    run: Callable[..., Any]
    """Takes the op's arguments, returns its results."""
    refuses: Callable[..., str | None]
    """Takes the op's arguments; returns why it cannot run them, or None."""
    checks: bool = False
    """Whether it looks itself, faster, at all that the op asks of its arguments."""


_REFUSED_BY_KERNELS = "gpt2fast: "
"""How the compiled ops begin to say what they cannot take (csrc/binding/common/check.h)."""


def _asks_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _has_no_elements(arguments: Sequence[Any]) -> bool:
    """Whether the first tensor, or one of floating-point numbers, is empty: so is the result."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    return any(not x.numel() and (x is tensors[0] or x.is_floating_point()) for x in tensors)


def _refuses_nothing(*args: Any, **kwargs: Any) -> str | None:
    return None


class Op:
    """An op: a schema in torch's dispatcher and the implementations behind it.

    Args:
        name, schema: as torch's dispatcher takes them.
        check: takes the op's arguments; raises ArgumentError for shapes, dtypes and numbers that
            no backend takes. It runs where the op is traced, too, so must not read values.
        values: the same for values of tensors on the CPU.
        one_device: whether all tensors must be on one device.
        implementations: by backend.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        check: Callable[..., None] | None = None,
        values: Callable[..., None] | None = None,
        one_device: bool = True,
        **implementations: Implementation | Callable,
    ):
        self.name = name
        self._check = check or _asks_nothing
        self._check_values = values or _asks_nothing
        self.implementations = {
            backend: implementation
            if isinstance(implementation, Implementation)
            else Implementation(implementation, _refuses_nothing)
            for backend, implementation in implementations.items()
        }
        self._checked_by_kernels = any(each.checks for each in self.implementations.values())
        _LIBRARY.define(f"{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, self._dispatch, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, self._autograd, "Autograd", with_keyset=True)
        _LIBRARY.impl(name, self._batched, "FuncTorchBatched")
        self.call = getattr(torch.ops.gpt2fast, name).default
        self._memory = Memory(self.call._schema, one_device)
        OPS[name] = self
        self._plain = self.implementations["reference"].run
        self._differentiable: Callable[..., Any] | None = None
        self._writes = [
            index
            for index, argument in enumerate(self.call._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self._no_gradient = "it writes in place" if self._writes else None

    def register_fake(self, fake: Callable) -> None:
        """Say which shapes and dtypes the op returns, for tracing without data."""

        def checked(*args: Any, **kwargs: Any) -> Any:
            self._memory.check_devices(args)
            self._check(*args, **kwargs)
            return fake(*args, **kwargs)

        torch.library.register_fake(f"gpt2fast::{self.name}", checked, lib=_LIBRARY)

    def register_autograd(self, backward: Callable, setup_context: Callable) -> None:
        """Say how gradients flow; both functions as in `torch.library.register_autograd`.

        Where `backward` is itself to be differentiated, or batched, it has to be an expression of
        what was saved, to which the results of `gradient` belong.
        """
        self._differentiable = make_autograd_impl(self.call, Info(backward, setup_context))

    def register_plain(self, plain: Callable) -> None:
        """Say which expression stands for the op where torch differentiates or batches it, should
        it be another one than the reference."""
        self._plain = plain

    def refuse_gradient(self, why: str) -> None:
        """Make it an error that says why to differentiate through this op.

        Of an op that writes in place the call is the error: where its numbers come from cannot be
        told of what it has written. Of others the backward pass is.

        Args:
            why: it has none.
        """
        self._no_gradient = why

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The results by an expression that torch differentiates to any order, in both modes, and
        batches: the reference, whatever backend is chosen."""
        self.require(*args)
        why = "its kernels have no derivatives beyond one backward pass, and are not batched"
        for record in _records:
            refusals = tuple((name, why) for name in ORDER if name != "reference")
            record.append(Call(self.name, "reference", refusals))
        return outside_autocast(self._plain, *args, **kwargs)

    def gradient(self, *args: Any) -> Any:
        """The results within a backward pass, differentiable where that is asked for.

        The arguments are what the forward pass has checked and kept, and a gradient, which torch
        has checked; so nothing is asked of them but what the kernels ask.
        """
        if torch.compiler.is_compiling():
            return self.call(*args)
        if wants_graph():
            return self.plain(*args)
        with _C._AutoDispatchBelowAutograd():
            _thread.checked = True
            try:
                return self.call(*args)
            finally:
                _thread.checked = False

    def _autograd(self, keyset: Any, *args: Any) -> Any:
        transformed = is_transformed()
        if transformed and self._no_gradient is None:
            return self.plain(*args)
        anchor = None
        if transformed or torch.is_grad_enabled():
            if self._differentiable is not None:
                return self._differentiable(keyset, *args)
            anchor = differentiated(args)
            if anchor is not None and self._no_gradient is None:
                return self.plain(*args)
        if anchor is not None and self._writes:
            raise self._writing_error(args)
        with _C._AutoDispatchBelowAutograd():
            result = self.call.redispatch(keyset & _C._after_autograd_keyset, *args)
        return result if anchor is None else self._refused(result, anchor, transformed)

    def _writing_error(self, args: Sequence[Any]) -> NotImplementedError:
        """What to say where an argument of an op that writes in place requires a gradient."""
        name = next(
            argument.name
            for argument, value in zip(self.call._schema.arguments, args, strict=False)
            if differentiated((value,)) is not None
        )
        return NotImplementedError(
            f"{self._gradient_error()}. It writes in place, and {name} requires a gradient: call "
            f"it under torch.no_grad(), or detach {name}"
        )

    def _refused(self, result: Any, anchor: Tensor, transformed: bool) -> Any:
        """The results, or an error where they would silently be constants."""
        if not any(tensor.is_floating_point() for tensor in tensors_in((result,))):
            return result
        if transformed:
            raise self._gradient_error()
        return refused(result, anchor, str(self._gradient_error()))

    def _gradient_error(self) -> NotImplementedError:
        return NotImplementedError(f"gpt2fast.ops.{self.name} has no gradient: {self._no_gradient}")

    def _batched(self, *args: Any) -> Any:
        if self._writes:
            raise NotImplementedError(
                f"gpt2fast.ops.{self.name} writes in place, which torch.vmap cannot batch; "
                "call it for each sample, or outside of vmap"
            )
        return self.plain(*args)

    def _choose(self, *args: Any, **kwargs: Any) -> tuple[str, list[tuple[str, str]]]:
        """The backend that would run these arguments, and why each earlier one would not.

        Raises:
            BackendError: the forced backend cannot run them.
        """
        refused: list[tuple[str, str]] = []
        for name in ORDER if _requested == "auto" else (_requested,):
            reason = self._refusal(name, *args, **kwargs)
            if reason is None:
                return name, refused
            refused.append((name, reason))
        if _requested in self.implementations and _has_no_elements(args):
            return "reference", refused  # kernels need something to compute
        raise BackendError(
            f"backend {_requested!r} cannot run {self.name}: {refused[-1][1]}; "
            'gpt2fast.backend("auto") falls back to one that can'
        )

    def _refusal(self, name: str, *args: Any, **kwargs: Any) -> str | None:
        implementation = self.implementations.get(name)
        if implementation is None:
            return f"{self.name} has no {name} implementation"
        return implementation.refuses(*args, **kwargs)

    def require(self, *args: Any) -> None:
        """The op's checks, for arguments that torch itself will compute with."""
        if torch.compiler.is_compiling() or is_transformed():
            self._check(*args)
        else:
            self._memory.check_devices(args)
            self._check_all(*args)

    def _check_all(self, *args: Any, **kwargs: Any) -> None:
        """Raises ArgumentError for arguments that no backend takes."""
        self._check(*args, **kwargs)
        self._memory.check(args)
        self._check_values(*args, **kwargs)

    def _dispatch(self, *args: Any, **kwargs: Any) -> Any:
        if not self._checked_by_kernels and not _thread.checked:
            self._check_all(*args, **kwargs)
        try:
            name, refused = self._choose(*args, **kwargs)
        except BackendError:
            self._check_all(*args, **kwargs)  # what no backend takes comes first
            raise
        implementation = self.implementations[name]
        if self._checked_by_kernels and not (
            implementation.checks and self._memory.are_apart(args)
        ):
            self._check_all(*args, **kwargs)
        for record in _records:
            record.append(Call(self.name, name, tuple(refused)))
        try:
            # Dtypes are settled before an op is called; its insides compute as they are written.
            return outside_autocast(implementation.run, *args, **kwargs)
        except RuntimeError as error:
            message = str(error)
            if not message.startswith(_REFUSED_BY_KERNELS):
                raise
            self._check_all(*args, **kwargs)  # says what is wrong in words of every backend
            raise ArgumentError(message.removeprefix(_REFUSED_BY_KERNELS)) from None


OPS: dict[str, Op] = {}
"""Every op by name."""


class backend:  # noqa: N801 - reads as a verb: gpt2fast.backend("reference")
    """Choose the implementation of every op, from now on or within a `with` block.

        gpt2fast.backend("reference")            # from here on
        with gpt2fast.backend("torch"): ...      # inside the block only

    Args:
        name: "auto" (the first that can run a call), "native", "triton", "torch", "reference".

    The choice holds for the whole process. It is read when an op runs, also inside code that was
    compiled with `torch.compile`.

    Raises:
        BackendError: no such backend, or no op of this version has an implementation for it.
    """

    def __init__(self, name: str):
        if name != "auto" and name not in ORDER:
            raise BackendError(f"no backend {name!r}; choose one of {', '.join(('auto', *ORDER))}")
        reason = AVAILABILITY[name]() if name in AVAILABILITY else None
        if reason is not None:
            raise BackendError(f"backend {name!r} is not available: {reason}")
        global _requested
        self._name = name
        self._previous = _requested
        _requested = name

    def __enter__(self) -> backend:
        global _requested
        if _requested != self._name:  # chosen earlier, and something else since
            self._previous, _requested = _requested, self._name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _requested
        _requested = self._previous


@contextmanager
def record_calls() -> Iterator[list[Call]]:
    """Collect every call of an op made within a `with` block, in order."""
    calls: list[Call] = []
    _records.append(calls)
    try:
        yield calls
    finally:
        _records.remove(calls)


def requested_backend() -> str:
    """The name last given to `backend`: "auto" unless one was forced."""
    return _requested


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and statistics over values of `dtype` are kept."""
    return dtype if dtype == torch.float64 else torch.float32


def autocast(*tensors: Tensor) -> Sequence[Tensor]:
    """Cast floating-point tensors to autocast's dtype where autocast is active.

    A custom op receives what it is given; torch's own matrix products are cast by autocast, and
    ours follow them so that the two can be mixed.
    """
    device = tensors[0].device.type
    # torch knows no autocast for tensors without data.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
