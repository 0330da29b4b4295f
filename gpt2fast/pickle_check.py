"""What a pickle would do, found out without doing it.

`torch.load(weights_only=True)` runs no code of a pickle's, but it can still be made to fill the
memory, to crash the interpreter or to run for ever: by constructors such as bytearray, by objects
that contain themselves twice over, forty levels deep, or by a key of a million nested tuples. What
torch.save writes for tensors, numbers and strings in containers is a small and tree-like part of
the language; a pickle that stays within it does work in proportion to its length.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import IO

import torch

# Three times what the checkpoint of a gpt2-xl in training takes, its optimizer included.
_MOST_STEPS = 200_000
# Hashing a tuple visits all that is in it; a shared one is visited each time it is met.
_LARGEST_TUPLE = 10_000
_LARGEST_SHARED_TUPLE = 100

_GLOBALS = {
    "collections OrderedDict",
    "torch Size",
    "torch device",
    "torch.nn.parameter Parameter",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
}

_POPS = {
    "APPEND": 1,
    "BINPERSID": 1,
    "BUILD": 1,
    "NEWOBJ": 2,
    "REDUCE": 2,
    "SETITEM": 2,
    "STOP": 1,
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
}
_POPS_TO_MARK = ("APPENDS", "SETITEMS", "TUPLE")
_CHANGES_ONLY = ("APPEND", "APPENDS", "BUILD", "SETITEM", "SETITEMS", "STOP")
_EMPTY = ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET")
_TUPLES = ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_GETS = ("BINGET", "LONG_BINGET")
_PUTS = ("BINPUT", "LONG_BINPUT")
_VALUES = (
    *("BINFLOAT", "BININT", "BININT1", "BININT2", "BINUNICODE", "LONG1"),
    *("NEWFALSE", "NEWTRUE", "NONE", "SHORT_BINSTRING"),
)
_STEPS = {
    *("GLOBAL", "MARK", "PROTO", *_POPS, *_POPS_TO_MARK, *_EMPTY, *_TUPLES, *_GETS, *_PUTS),
    *_VALUES,
}


@dataclass
class _Object:
    """What is known of an object on the unpickler's stack."""

    kind: str = "value"  # "tuple", "container", or the name of a global
    size: int = 1  # of a tuple: the number of objects in it, at any depth


def objection(stream: IO[bytes]) -> str | None:
    """Why the pickle at the stream's position must not be loaded, or None; the stream advances.

    Raises:
        ValueError, IndexError, KeyError: the pickle is damaged.
    """
    stack: list[_Object] = []
    marks: list[int] = []
    memo: dict[object, _Object] = {}
    for count, (step, argument, _) in enumerate(pickletools.genops(stream)):
        name = step.name
        if count > _MOST_STEPS:
            return f"has more than {_MOST_STEPS} steps"
        if name not in _STEPS:
            return f"uses the instruction {name}, which torch.save does not write"
        if name == "MARK":
            marks.append(len(stack))
            continue
        if name in _PUTS:
            memo[argument] = stack[-1]
            continue
        start = marks.pop() if name in _POPS_TO_MARK else len(stack) - _POPS.get(name, 0)
        if start < 0:
            raise IndexError("the pickle takes more from its stack than there is")
        operands = stack[start:]
        del stack[start:]
        if name in _GETS:
            shared = memo[argument]
            if shared.kind == "container" or shared.size > _LARGEST_SHARED_TUPLE:
                return "holds one container in several places"
            stack.append(shared)
        elif name == "GLOBAL":
            if not _is_known(str(argument)):
                return f"uses {str(argument).replace(' ', '.'):.100}, which could run code"
            stack.append(_Object(str(argument)))
        elif name in ("NEWOBJ", "REDUCE"):
            is_dict = operands[0].kind == "collections OrderedDict"
            stack.append(_Object("container" if is_dict else "value"))
        elif name in _TUPLES:
            size = 1 + sum(operand.size for operand in operands)
            if size > _LARGEST_TUPLE:
                return f"holds a tuple of more than {_LARGEST_TUPLE} objects"
            stack.append(_Object("tuple", size))
        elif name in _EMPTY:
            stack.append(_Object("container"))
        elif name not in _CHANGES_ONLY and name != "PROTO":
            stack.append(_Object())
    return None


def _is_known(argument: str) -> bool:
    if argument in _GLOBALS:
        return True
    module, _, name = argument.partition(" ")
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return True
    return module in ("torch", "torch.cuda", "torch.storage") and name.endswith("Storage")
