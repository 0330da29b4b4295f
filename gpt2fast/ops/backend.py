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

from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import _C, Tensor

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
"""By backend, for those not on every machine: the reason that it is unavailable, or None."""


@dataclass(frozen=True)
class Call:
    """One call of an op: which backend ran it, and which were passed over."""

    op: str
    backend: str
    refused: tuple[tuple[str, str], ...]
    """Each backend tried before, and why it could not run the call."""


class Arguments(tuple):
    """The arguments of one call, by their names in the op's schema: `call.q`, `call.scale`.

    Each op has a named tuple of its own. `reference(*call)` spells them out.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


_LIBRARY = torch.library.Library("gpt2fast", "DEF")
# One choice for the whole process: autograd runs backward passes in threads of its own.
_requested = "auto"
_records: list[list[Call]] = []


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op."""

    run: Callable[[Arguments], Any]
    """Returns the op's results."""
    refuses: Callable[[Arguments], str | None] = lambda call: None
    """Returns why it cannot run a call, or None."""
    checks: bool = False
    """True if its kernels make all of the op's checks of its arguments, faster than `check`."""

    def suiting(self, call: Arguments) -> Implementation:
        """The implementation for this call."""
        return self


@dataclass(frozen=True)
class ByDevice:
    """An implementation for GPUs and another one for all other devices."""

    cpu: Implementation
    gpu: Implementation
    is_for_gpu: Callable[[Tensor], bool]
    """Returns true for a tensor that `gpu` handles."""

    def suiting(self, call: Arguments) -> Implementation:
        """The implementation for this call."""
        return self.gpu if self.is_for_gpu(first_tensor(call)) else self.cpu


def first_tensor(arguments: Sequence[Any]) -> Tensor:
    """The first tensor among arguments; all are on its device."""
    first = arguments[0]
    return first if isinstance(first, Tensor) else next(tensors_in(arguments))


_REFUSED_BY_KERNELS = "gpt2fast: "
"""Prefix of the errors that compiled ops raise (csrc/binding/common/check.h)."""


def _requires_nothing(call: Arguments) -> None:
    pass


def _has_no_elements(call: Arguments) -> bool:
    """True if the first tensor or a floating-point one is empty: the result is then, too."""
    tensors = [x for x in call if isinstance(x, Tensor)]
    return any(not x.numel() and (x is tensors[0] or x.is_floating_point()) for x in tensors)


# Typed as Any, since mypy cannot know the fields.
_named_tuple: Any = namedtuple
_PASS_ON = (
    "AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA", "BackendSelect"
)  # fmt: skip
_known_keys: dict[int, bool] = {}


def _reaches_kernels(keys: _C.DispatchKeySet) -> bool:
    """True if torch's dispatcher would go straight from autograd to the kernels of a CPU or GPU.

    Otherwise something else takes part: a mode, a subclass of Tensor, tracing, batching, a device
    without data.
    """
    raw = keys.raw_repr()
    known = _known_keys.get(raw)
    if known is None:
        for name in _PASS_ON:
            keys = keys.remove(getattr(_C.DispatchKey, name))
        known = keys.highestPriorityTypeId() in (_C.DispatchKey.CPU, _C.DispatchKey.CUDA)
        _known_keys[raw] = known
    return known


_USUAL_TYPES = {
    Tensor, torch.nn.Parameter, int, float, bool, str, list, torch.dtype, type(None)
}  # fmt: skip


class Op:
    """An op: a schema in torch's dispatcher and the implementations behind it.

    A call is bound to the schema once; all functions below but the reference take it as one
    argument, `call`, whose attributes are the op's arguments.

    Args:
        name, schema: as torch's dispatcher takes them.
        reference: the plain torch expression that defines the op. It takes the op's arguments.
        check: raises ArgumentError for shapes, dtypes and numbers that no backend takes. It runs
            where the op is traced, too, so must not read values.
        values: the same for values of tensors on the CPU.
        one_device: all tensors must be on one device.
        implementations: by backend. If `torch` is left out, it is the reference.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        reference: Callable[..., Any],
        check: Callable[[Arguments], None] = _requires_nothing,
        values: Callable[[Arguments], None] = _requires_nothing,
        one_device: bool = True,
        **implementations: Implementation | ByDevice | Callable[[Arguments], Any],
    ):
        self.name = name
        self._check = check
        self._check_values = values
        plain = Implementation(lambda call: reference(*call))
        self.implementations = {
            backend: implementation
            if isinstance(implementation, (Implementation, ByDevice))
            else Implementation(implementation)
            for backend, implementation in ({"torch": plain} | implementations).items()
        } | {"reference": plain}
        self._checked_by_kernels = any(
            isinstance(each, Implementation) and each.checks
            for each in self.implementations.values()
        )
        _LIBRARY.define(f"{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, self._dispatch, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, self._autograd, "Autograd", with_keyset=True)
        _LIBRARY.impl(name, self._batched, "FuncTorchBatched")
        self.call = getattr(torch.ops.gpt2fast, name).default
        arguments = self.call._schema.arguments
        defaults = [each.default_value for each in arguments if each.has_default_value()]
        names = [each.name for each in arguments]
        self.bind: Callable[..., Arguments] = _named_tuple(name, names, defaults=defaults)
        """The call with these arguments."""
        self._memory = Memory(self.call._schema, one_device)
        OPS[name] = self
        self._reference = plain
        self._plain = plain.run
        self._record: Callable[..., Any] | None = None
        self._writes = self._memory.writes
        self._no_gradient = "it writes in place" if self._writes else None

    def register_fake(self, fake: Callable[[Arguments], Any]) -> None:
        """Say which shapes and dtypes the op returns, for tracing without data."""

        def checked(*args: Any) -> Any:
            call = self.bind(*args)
            self._memory.check_devices(call)
            self._check(call)
            return fake(call)

        torch.library.register_fake(f"gpt2fast::{self.name}", checked, lib=_LIBRARY)

    def register_autograd(
        self,
        backward: Callable[..., tuple[Tensor | None, ...]],
        setup_context: Callable[[Any, Arguments, Any], None],
    ) -> None:
        """Say how gradients flow.

        Args:
            backward: takes the context and the results' gradients; returns the gradients of the
                first arguments, those after them having none. Where it is itself
                differentiated or batched, it has to be an expression of the saved tensors;
                results of `gradient` may be part of it.
            setup_context: takes the context, the call and its results, and saves what `backward`
                needs.
        """
        op, count = self, len(self.call._schema.arguments) + 1

        class Graph(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                call = op.bind(*args[:-1])
                result = op._below_autograd(args[-1], call)
                setup_context(ctx, call, result)
                return result

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                result = backward(ctx, *gradients)
                return result + (None,) * (count - len(result))

        Graph.__name__ = f"gpt2fast_{self.name}"
        # Not Graph.apply: in Python, it first looks for transforms of torch.func and unwraps
        # tensors that these left behind, which torch's dispatcher and `_autograd` have done.
        self._record = super(torch.autograd.Function, Graph).apply

    def register_plain(self, plain: Callable[[Arguments], Any]) -> None:
        """Set another expression than the reference to stand for the op where torch differentiates
        or batches it."""
        self._plain = plain

    def refuse_gradient(self, why: str) -> None:
        """Make differentiating through this op an error.

        An op that writes in place raises when it is called, since what it has written does not
        remember where it came from; other ops raise in the backward pass.

        Args:
            why: the reason, for the message.
        """
        self._no_gradient = why

    def plain(self, *args: Any) -> Any:
        """The results by the reference, whatever backend is chosen: an expression that torch can
        differentiate to any order, in both modes, and batch."""
        self.require(*args)
        why = "its kernels have no derivatives beyond one backward pass, and are not batched"
        for record in _records:
            refusals = tuple((name, why) for name in ORDER if name != "reference")
            record.append(Call(self.name, "reference", refusals))
        return outside_autocast(self._plain, self.bind(*args))

    def gradient(self, *args: Any) -> Any:
        """The results within a backward pass, differentiable where that is asked for.

        The forward pass has checked the saved arguments, and torch the gradient: only the kernels'
        own requirements are checked here.
        """
        if torch.compiler.is_compiling():
            return self.call(*args)
        if wants_graph():
            return self.plain(*args)
        with _C._AutoDispatchBelowAutograd():
            if _USUAL_TYPES.issuperset(map(type, args)) and _reaches_kernels(
                _C._dispatch_keys(args[0]) | _C._dispatch_tls_local_include_set()
            ):
                return self._run(self.bind(*args), checked=True)
            return self.call(*args)

    def _autograd(self, keyset: _C.DispatchKeySet, *args: Any) -> Any:
        transformed = is_transformed()
        if transformed and self._no_gradient is None:
            return self.plain(*args)
        call = self.bind(*args)
        anchor = None
        if transformed or torch.is_grad_enabled():
            if self._record is None:
                anchor = differentiated(call)
                if anchor is not None and self._no_gradient is None:
                    return self.plain(*args)
            elif _C._any_requires_grad(*args):
                return self._record(*call, keyset)
        if anchor is not None and self._writes:
            raise self._writing_error(call)
        result = self._below_autograd(keyset, call)
        return result if anchor is None else self._refused(result, anchor, transformed)

    def _below_autograd(self, keyset: _C.DispatchKeySet, call: Arguments) -> Any:
        """The results, computed by what follows autograd in torch's dispatcher."""
        with _C._AutoDispatchBelowAutograd():
            if _reaches_kernels(keyset):
                return self._run(call)
            return self.call.redispatch(keyset & _C._after_autograd_keyset, *call)

    def _writing_error(self, call: Arguments) -> NotImplementedError:
        """The error where an argument of an op that writes in place requires a gradient."""
        name = next(
            argument.name
            for argument, value in zip(self.call._schema.arguments, call, strict=True)
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

    def _choose(self, call: Arguments) -> tuple[str, Implementation, Sequence[tuple[str, str]]]:
        """The backend that would run a call, its implementation, and why each earlier one would
        not.

        Raises:
            BackendError: the forced backend cannot run it.
        """
        refused: list[tuple[str, str]] = []
        for name in ORDER if _requested == "auto" else (_requested,):
            if name not in self.implementations:
                refused.append((name, f"{self.name} has no {name} implementation"))
                continue
            implementation = self.implementations[name].suiting(call)
            reason = implementation.refuses(call)
            if reason is None:
                return name, implementation, refused
            refused.append((name, reason))
        if _requested in self.implementations and _has_no_elements(call):
            # kernels take no empty tensors
            return "reference", self._reference, refused
        raise BackendError(
            f"backend {_requested!r} cannot run {self.name}: {refused[-1][1]}; "
            'gpt2fast.backend("auto") falls back to one that can'
        )

    def chosen(self, call: Arguments) -> str:
        """The backend that runs a call, for a kernel that takes the op's place; `record_calls`
        collects it as if the op had been called, unless another backend than `native` is chosen."""
        name, _, refused = self._choose(call)
        for record in _records if name == "native" else ():
            record.append(Call(self.name, name, tuple(refused)))
        return name

    def require(self, *args: Any) -> None:
        """The op's checks, for arguments that torch itself will compute with."""
        call = self.bind(*args)
        if torch.compiler.is_compiling() or is_transformed():
            self._check(call)
        else:
            self._memory.check_devices(call)
            self._check_all(call)

    def _check_all(self, call: Arguments) -> None:
        """Raises ArgumentError for arguments that no backend takes."""
        self._check(call)
        self._memory.check(call)
        self._check_values(call)

    def _dispatch(self, *args: Any) -> Any:
        return self._run(self.bind(*args))

    def _run(self, call: Arguments, checked: bool = False) -> Any:
        """The results by the backend that was asked for.

        Args:
            checked: arguments that no backend takes have been refused already.
        """
        if not self._checked_by_kernels and not checked:
            self._check_all(call)
        try:
            name, implementation, refused = self._choose(call)
        except BackendError:
            self._check_all(call)  # errors that all backends share come first
            raise
        if self._checked_by_kernels and not (
            implementation.checks and self._memory.are_apart(call)
        ):
            self._check_all(call)
        for record in _records:
            record.append(Call(self.name, name, tuple(refused)))
        try:
            # Autocast has acted before an op is called; inside, dtypes are as written.
            return outside_autocast(implementation.run, call)
        except RuntimeError as error:
            message = str(error)
            if not message.startswith(_REFUSED_BY_KERNELS):
                raise
            self._check_all(call)  # the same words whichever backend runs
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
        if _requested != self._name:  # something else was chosen since
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
    # torch has no autocast for the meta device.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
