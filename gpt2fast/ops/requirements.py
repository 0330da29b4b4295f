"""Checks of an op's arguments that every backend shares; a call that fails one is an error.

An op's schema says which tensors it writes; from that follows what all ops ask of memory
(`Memory`): tensors lie on one device and within their storage, and what is written overlaps
nothing. Shapes, dtypes and ranges an op declares in its own file, in the words below, and hands
to `Op(check=...)` and, where the numbers inside of tensors count, to `Op(values=...)`.

Values are checked on the CPU only: elsewhere that would wait for the device, whose kernels fail an
assertion at an index outside of its table, as torch's own do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor

from ..errors import ArgumentError

_STRIDED = torch.strided
_HOLD_TENSORS = (list, tuple)
# Small vectors, such as the rows of a cache, are read faster one by one.
_FEW = 64
_MOST_STEPS = 10_000


class Memory:
    """Devices, storages and overlaps of an op's tensors.

    Args:
        schema: the op's, which marks what is written.
        one_device: all tensors must be on one device.
    """

    def __init__(self, schema: torch.FunctionSchema, one_device: bool = True):
        self._names = [argument.name for argument in schema.arguments]
        self._written = [
            argument.alias_info is not None and argument.alias_info.is_write
            for argument in schema.arguments
        ]
        self.writes = any(self._written)
        """True if the op writes into one of its tensors."""
        self._one_device = one_device

    def check(self, arguments: Sequence[object]) -> None:
        """Raises ArgumentError unless these arguments can be read and written."""
        if self.writes:
            self._check_thoroughly(arguments)
            return
        # Every op's call comes through here: the usual case takes as few calls as possible.
        device = None
        for argument in arguments:
            if isinstance(argument, Tensor):
                place = argument.get_device()
                if device is None:
                    device = place
                if place != device or argument.layout is not _STRIDED:
                    break
                last = argument.storage_offset()
                if argument.is_contiguous():
                    last += argument.numel()
                else:
                    last += 1
                    for count, step in zip(argument.shape, argument.stride(), strict=True):
                        last += (count - 1) * step
                if last * argument.itemsize > argument.untyped_storage().nbytes():
                    break
            elif argument.__class__ in _HOLD_TENSORS:
                break
        else:
            return
        self._check_thoroughly(arguments)

    def _check_thoroughly(self, arguments: Sequence[object]) -> None:
        self.check_devices(arguments)
        spans: list[tuple[int, int, bool, Tensor, str]] = []
        for name, written, argument in zip(self._names, self._written, arguments, strict=False):
            for x in argument if isinstance(argument, (list, tuple)) else (argument,):
                if not isinstance(x, Tensor) or not x.numel():
                    continue
                if x.layout is not _STRIDED:
                    raise ArgumentError(f"{name} is a {x.layout} tensor; ops take strided ones")
                contiguous = x.is_contiguous()
                if contiguous:
                    count = x.numel()
                else:
                    steps = zip(x.shape, x.stride(), strict=True)
                    count = 1 + sum((n - 1) * step for n, step in steps)
                size = x.itemsize
                needed = (x.storage_offset() + count) * size
                if needed > x.untyped_storage().nbytes():
                    raise _resized(name, x, needed)
                if self.writes:
                    begin = x.data_ptr()
                    spans.append((begin, begin + count * size, written, x, name))
                    if written and not contiguous:
                        _check_written(name, x)
        if spans:
            _check_overlaps(spans)

    def are_apart(self, arguments: Sequence[object]) -> bool:
        """True if written tensors have storages of their own, as nearly all do."""
        storages = set()
        count = 0
        for written, x in zip(self._written, arguments, strict=False):
            if written and isinstance(x, Tensor):
                count += 1
                storages.add(x.untyped_storage().data_ptr())
        return len(storages) == count

    def check_devices(self, arguments: Sequence[object]) -> None:
        """Raises ArgumentError where tensors that must be on one device are on several."""
        if not self._one_device:
            return
        first: tuple[str, torch.device] | None = None
        for name, argument in zip(self._names, arguments, strict=False):
            for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
                if not isinstance(tensor, Tensor):
                    continue
                if first is None:
                    first = name, tensor.device
                elif tensor.device != first[1]:
                    raise ArgumentError(
                        f"{first[0]} is on {first[1]} and {name} on {tensor.device}; an op's "
                        "tensors must be on one device"
                    )


def _resized(name: str, x: Tensor, needed: int | torch.SymInt) -> ArgumentError:
    return ArgumentError(
        f"{name} {tuple(x.shape)} needs {needed} bytes of storage, which holds "
        f"{x.untyped_storage().nbytes()}: it was resized"
    )


def _check_written(name: str, x: Tensor) -> None:
    reach = 1
    for step, count in sorted(zip(x.stride(), x.shape, strict=True)):
        if count > 1:
            if step < reach:
                raise ArgumentError(
                    f"{name} is written in place, and several of its elements share one place in "
                    "memory: it was expanded; clone it first"
                )
            reach = step * (count - 1) + reach


def _check_overlaps(spans: list[tuple[int, int, bool, Tensor, str]]) -> None:
    """Check that nothing written overlaps anything else; views may interleave."""
    spans.sort(key=itemgetter(0))
    furthest = furthest_written = 0
    for begin, end, written, _, _ in spans:
        if begin < furthest_written or (written and begin < furthest):
            break
        furthest = max(furthest, end)
        if written:
            furthest_written = max(furthest_written, end)
    else:
        return
    for index, (begin, end, written, x, name) in enumerate(spans):
        for other_begin, other_end, other_written, y, other in spans[index + 1 :]:
            if other_begin >= end:
                break
            if (written or other_written) and begin < other_end and overlap(x, y):
                both = (name, other) if written else (other, name)
                raise ArgumentError(
                    f"{both[0]} is written in place and shares memory with "
                    f"{'another of its own' if name == other else both[1]}; clone one of them"
                )


def overlap(x: Tensor, y: Tensor) -> bool:
    """True if two tensors have a byte in common; interleaved elements do not count."""
    reach: dict[int, list[int]] = {}  # step -> how often it can be taken
    for tensor, sign in ((x, -1), (y, 1)):
        for step, count in zip(tensor.stride(), tensor.shape, strict=True):
            least_most = reach.setdefault(step * tensor.element_size(), [0, 0])
            least_most[sign > 0] += sign * (count - 1)
    reach.pop(0, None)
    steps = [(step, low, high) for step, (low, high) in sorted(reach.items(), reverse=True)]
    distance = y.data_ptr() - x.data_ptr()
    budget = [_MOST_STEPS]
    return _meets(steps, -y.element_size() + 1 - distance, x.element_size() - 1 - distance, budget)


def _meets(steps: Sequence[tuple[int, int, int]], low: int, high: int, budget: list[int]) -> bool:
    """True if some of the steps add up to a number in [low, high], or if the budget is spent."""
    if not steps:
        return low <= 0 <= high
    step, least, most = steps[0]
    rest_low = sum(s * n for s, n, _ in steps[1:])
    rest_high = sum(s * n for s, _, n in steps[1:])
    first = max(least, -(-(low - rest_high) // step))
    last = min(most, (high - rest_low) // step)
    for count in range(first, last + 1):
        budget[0] -= 1
        if budget[0] < 0 or _meets(steps[1:], low - count * step, high - count * step, budget):
            return True
    return False


# Dtypes and shapes.


def check_floating(**tensors: Tensor | None) -> None:
    """Check that each given tensor holds floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ArgumentError(f"{name} must be floating point, not {tensor.dtype}")


def check_integers(**tensors: Tensor | None) -> None:
    """Check that each given tensor is int64."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != torch.int64:
            raise ArgumentError(f"{name} must be int64, not {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, *shape: int, says: str) -> None:
    """Check that the tensor has this shape; `says` names the sizes, as "(B, T)"."""
    if tensor.shape != shape:
        raise ArgumentError(f"{name} must be {says} = {tuple(shape)}, not {tuple(tensor.shape)}")


def check_dim(name: str, tensor: Tensor, *dims: int, says: str) -> None:
    """Check that the tensor has one of these numbers of dimensions."""
    if tensor.dim() not in dims:
        raise ArgumentError(f"{name} must be {says}, not {tuple(tensor.shape)}")


# Ranges. Only comparisons, which work on traced numbers and are false for NaN.


def check_constants(**numbers: object) -> None:
    """Check that no number is a tensor that requires a gradient, which an op would lose."""
    for name, number in numbers.items():
        if isinstance(number, Tensor) and number.requires_grad:
            raise ArgumentError(
                f"{name} requires a gradient, and this op has none for it: pass a number, or "
                f"{name}.detach(), and multiply a tensor by what is learned"
            )


def check_finite(**numbers: float) -> None:
    """Check that each number is finite."""
    for name, number in numbers.items():
        if not -math.inf < number < math.inf:
            raise ArgumentError(f"{name}={number} must be a finite number")


def check_at_least(low: float, **numbers: float) -> None:
    """Check that each number is finite and `low` or more."""
    for name, number in numbers.items():
        if not low <= number < math.inf:
            raise ArgumentError(f"{name}={number} must be a finite number, {low} at least")


def check_above(low: float, **numbers: float) -> None:
    """Check that each number is finite and more than `low`."""
    for name, number in numbers.items():
        if not low < number < math.inf:
            raise ArgumentError(f"{name}={number} must be a finite number above {low}")


def check_share(**numbers: float) -> None:
    """Check that each number is in [0, 1]."""
    for name, number in numbers.items():
        if not 0 <= number <= 1:
            raise ArgumentError(f"{name}={number} is not in [0, 1]")


def check_below_one(**numbers: float) -> None:
    """Check that each number is in [0, 1), so that 1 - p can be divided by."""
    for name, number in numbers.items():
        if not 0 <= number < 1:
            raise ArgumentError(f"{name}={number} is not in [0, 1)")


# Values of tensors, on the CPU.


def check_indices(
    name: str, tensor: Tensor, low: int, high: int, but: int | None = None, of: str = ""
) -> None:
    """Check that integers on the CPU lie in [low, high], or equal `but`; `of` is what they count.

    Raises:
        ArgumentError: naming the first that does not.
    """
    if tensor.device.type != "cpu" or not tensor.numel():
        return
    if tensor.numel() <= _FEW:
        values = tensor.flatten().tolist()
        least, most = min(values), max(values)
    else:
        least, most = (int(end) for end in torch.aminmax(tensor))
    if low <= least and most <= high:
        return
    outside = (tensor < low) | (tensor > high)
    if but is not None:
        outside &= tensor != but
    if not bool(outside.any()):
        return
    at = outside.nonzero()[0].tolist()
    place = f"[{', '.join(map(str, at))}]" if at else ""
    raise ArgumentError(
        f"{name}{place} = {int(tensor[tuple(at)])} is not in {low} .. {high}"
        + (f", {of}" if of else "")
        + (f", nor {but}, which does not count" if but is not None else "")
    )


def check_fractions(name: str, tensor: Tensor) -> None:
    """Check that numbers on the CPU lie in [0, 1)."""
    if tensor.device.type != "cpu":
        return
    for index, value in enumerate(tensor.tolist()):
        if not 0 <= value < 1:
            raise ArgumentError(f"{name}[{index}] = {value} is not in [0, 1)")


def check_room(lengths: Tensor, counts: Tensor | None, time: int, entries: int) -> None:
    """Check that rows with `lengths` entries have room for `counts` (or `time`) more; CPU only.

    Args:
        lengths, counts: (B,) int64; a count above `time` means `time`, one below 0 none.
        entries: most entries of a row of the cache.
    """
    if lengths.device.type != "cpu" or not len(lengths):
        return
    held = lengths.tolist()
    if min(held) >= 0 and max(held) + time <= entries:
        return
    check_indices("lengths", lengths, 0, entries, of="what a row of the cache holds")
    more = [time] * len(held) if counts is None else counts.tolist()
    for row, (length, count) in enumerate(zip(held, more, strict=True)):
        count = max(0, min(count, time))
        if length + count > entries:
            raise ArgumentError(
                f"row {row} holds {length} of at most {entries} entries; {count} more do not fit"
            )
