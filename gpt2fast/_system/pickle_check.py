"""The one policy for pickles: read without running what is in them.

A pickle is a program for a stack machine that can call any function of Python. This is that
machine without the calls: it makes numbers, texts and containers itself, and in place of a class or
function puts what the caller's table has under its name; for any other name the pickle is refused.
No object's own `__reduce__`, `__setstate__` or `__dict__` is ever reached, and what is checked is
what is made: there is no second reader that could understand the same bytes differently.

What torch.save and the like write is a small and tree-like part of the language. Work and memory
are in proportion to its length: containers are not shared, so nothing doubles forty times over;
keys are texts and small numbers, so that no hash is slow; nothing is nested deeper than an error
message, `==` or the garbage collector can follow.

    nanoGPT's meta.pkl          no name at all          tokenizer/nanogpt.py
    torch.save's files          tensors, and records    checkpoints/torch_files.py
    an optimizer's index        torch's classes, after they were read as records    …/shards.py
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import IO, Any

from ..errors import shown

# Three times what the checkpoint of a gpt2-xl in training takes, its optimizer included.
MOST_STEPS = 200_000
_DEEPEST = 100
# Objects within a value that a pickle refers to again; they count each time.
_LARGEST_SHARED = 100
_LARGEST_INTEGER = 1 << 64

Known = Mapping[str, Any]
"""By "module name": a function or class to call with the arguments that the pickle has for it, or
a value to stand for it. For a class without functions of its own, `Record`."""


class Objection(ValueError):
    """A reason not to read a file: policy, a limit or its format; follows the file's name."""


class Record:
    """In place of an object: the arguments it was to be made with, and its state."""

    has_state = False
    """True if a state follows also where there are arguments."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None


def ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    """Stands for collections.OrderedDict: a dict, which is ordered too."""
    if type(pairs) is list and all(type(pair) is list and len(pair) == 2 for pair in pairs):
        for key, _ in pairs:
            _check_key(key)
        return dict(pairs)
    if pairs == ():
        return {}
    raise Objection("makes an OrderedDict of what is no list of pairs")


def record(name: str, *, has_state: bool = False) -> type[Record]:
    """A kind of record of its own, so that one is not taken for another."""
    return type(name, (Record,), {"has_state": has_state})


@dataclass
class _Cell:
    """A value on the stack."""

    value: Any
    kind: str = "value"  # or "container" (a list or dict), "record", "global"
    size: int = 1  # the objects in it
    depth: int = 0


def unpickle(
    stream: IO[bytes],
    known: Known,
    persistent: Callable[[Any], Any] | None = None,
    most_steps: int = MOST_STEPS,
) -> Any:
    """The value of the pickle at the stream's position; the stream stands behind it afterward.

    The pickle may name what is `known`; `persistent` gives the objects that it refers to by ids.

    Raises:
        Objection: it is not one of those that are read.
        ValueError, IndexError, KeyError, TypeError, AttributeError: it is damaged.
    """
    return _Machine(known, persistent).run(stream, most_steps)


def unpickle_objects(
    content: bytes, classes: Mapping[str, Collection[str]], check: Callable[[Any], None]
) -> Any:
    """The objects in a pickle that names nothing but `classes`, checked before any is made.

    Args:
        content: the pickle.
        classes: names by module; all of them have to be harmless with any arguments and state.
        check: raises what it objects to in the value, which has a `Record` for each object.
    """
    named = [f"{module} {name}" for module, names in classes.items() for name in names]
    check(unpickle(io.BytesIO(content), {name: record(name) for name in named}))
    return _ObjectsUnpickler(content, classes).load()


class _ObjectsUnpickler(pickle.Unpickler):
    def __init__(self, content: bytes, classes: Mapping[str, Collection[str]]) -> None:
        super().__init__(io.BytesIO(content))
        self.classes = classes

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.classes.get(module, ()):
            raise Objection(f"uses {shown(f'{module}.{name}', 100)}, which could run code")
        return super().find_class(module, name)


class _Machine:
    def __init__(self, known: Known, persistent: Callable[[Any], Any] | None) -> None:
        self.known, self.persistent = known, persistent
        self.stack: list[_Cell] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Cell] = {}

    def run(self, stream: IO[bytes], most_steps: int) -> Any:
        for count, (step, argument, _) in enumerate(pickletools.genops(stream)):
            if count > most_steps:
                raise Objection(f"has more than {most_steps} steps")
            name = step.name
            if name in _VALUES:
                if type(argument) is int and abs(argument) >= _LARGEST_INTEGER:
                    raise Objection("holds an integer of more than 64 bits")
                self.stack.append(_Cell(argument))
            elif name in _CONSTANTS:
                self.stack.append(_Cell(_CONSTANTS[name]))
            elif name == "STOP":
                return self.pop(1)[0].value
            else:
                handle = _STEPS.get(name)
                if handle is None:
                    raise Objection(f"uses the instruction {name}, which is not read")
                handle(self, argument)
        raise ValueError("the pickle has no end")

    def pop(self, count: int) -> list[_Cell]:
        # Not below the last mark: real pickles never do, and marks would lose their places.
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise IndexError("the pickle takes more from its stack than there is")
        cells = self.stack[start:]
        del self.stack[start:]
        return cells

    def pop_to_mark(self) -> list[_Cell]:
        cells = self.stack[self.marks[-1] :]
        del self.stack[self.marks.pop() :]
        return cells

    def push(self, cell: _Cell) -> None:
        if cell.depth > _DEEPEST:
            raise Objection(f"is nested more than {_DEEPEST} deep")
        self.stack.append(cell)

    def top(self) -> _Cell:
        (cell,) = self.pop(1)
        self.stack.append(cell)
        return cell

    # -- steps ---------------------------------------------------------------------------------

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def put(self, place: int) -> None:
        self.memo[place] = self.top()

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.top()

    def get(self, place: int) -> None:
        cell = self.memo[place]
        unfinished = cell.kind == "record" and cell.value.state is None
        if cell.kind == "container" or unfinished or cell.size > _LARGEST_SHARED:
            raise Objection("holds one container in several places")
        self.stack.append(cell)

    def empty_dict(self, _: Any) -> None:
        self.stack.append(_Cell({}, "container"))

    def empty_list(self, _: Any) -> None:
        self.stack.append(_Cell([], "container"))

    def named(self, argument: str) -> None:
        self.find(*argument.split(" ", 1))

    def named_on_stack(self, _: Any) -> None:
        module, name = (cell.value for cell in self.pop(2))
        self.find(module, name)

    def find(self, module: Any, name: Any) -> None:
        key = f"{module} {name}"
        if not (isinstance(module, str) and isinstance(name, str)) or key not in self.known:
            raise Objection(f"uses {shown(f'{module}.{name}', 100)}, which could run code")
        self.stack.append(_Cell(self.known[key], "global"))

    def by_id(self, _: Any) -> None:
        (cell,) = self.pop(1)
        if self.persistent is None:
            raise Objection("refers to objects outside itself")
        self.stack.append(_Cell(self.persistent(cell.value)))

    def call(self, _: Any) -> None:
        function, arguments = self.pop(2)
        if function.kind != "global" or not callable(function.value):
            raise Objection(f"calls {shown(function.value, 100)}, which is not a function")
        if type(arguments.value) is not tuple:
            raise TypeError("the arguments of a call are no tuple")
        made = function.value(*arguments.value)
        kind = "container" if type(made) in (dict, list) else "value"
        if isinstance(made, Record) and (made.has_state or not made.arguments):  # still to come
            kind = "record"
        self.push(_Cell(made, kind, arguments.size, arguments.depth + 1))

    def tuple_of(self, cells: list[_Cell]) -> None:
        size = 1 + sum(cell.size for cell in cells)
        depth = 1 + max((cell.depth for cell in cells), default=0)
        self.push(_Cell(tuple(cell.value for cell in cells), size=size, depth=depth))

    def append(self, cells: list[_Cell]) -> None:
        target = self.top()
        if type(target.value) is not list:
            raise TypeError("the pickle appends to what is no list")
        target.value.extend(cell.value for cell in cells)
        self.deepen(target, cells)

    def set_items(self, cells: list[_Cell]) -> None:
        target = self.top()
        if type(target.value) is not dict or target.kind != "container":
            raise TypeError("the pickle sets items of what is no dict")
        if len(cells) % 2:
            raise ValueError("the pickle has a key without a value")
        for key, value in zip(cells[::2], cells[1::2], strict=True):
            if key.kind != "record":
                _check_key(key.value)
            target.value[key.value] = value.value
        self.deepen(target, cells)

    def build(self, _: Any) -> None:
        (state,) = self.pop(1)
        target = self.top()
        if target.kind == "record" and target.value.state is None:
            target.value.state = state.value
        elif type(target.value) is not dict or type(state.value) is not dict:
            # torch gives the OrderedDict of a module's tensors an attribute: left out.
            raise Objection(f"changes the attributes of a {type(target.value).__name__}")
        self.deepen(target, [state])

    def deepen(self, target: _Cell, cells: list[_Cell]) -> None:
        target.size += sum(cell.size for cell in cells)
        target.depth = max(target.depth, 1 + max((cell.depth for cell in cells), default=-1))
        if target.depth > _DEEPEST:
            raise Objection(f"is nested more than {_DEEPEST} deep")


def _check_key(key: object) -> None:
    if type(key) not in (str, int, float, bool, type(None)):
        raise Objection(f"has a key that is a {type(key).__name__}")


_VALUES = {
    *("BINFLOAT", "BININT", "BININT1", "BININT2", "LONG1"),
    *("BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "SHORT_BINUNICODE"),
}
_CONSTANTS: dict[str, Any] = {"NEWFALSE": False, "NEWTRUE": True, "NONE": None}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": _Machine.mark,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "EMPTY_DICT": _Machine.empty_dict,
    "EMPTY_LIST": _Machine.empty_list,
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.named_on_stack,
    "BINPERSID": _Machine.by_id,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "EMPTY_TUPLE": lambda machine, _: machine.tuple_of([]),
    "TUPLE1": lambda machine, _: machine.tuple_of(machine.pop(1)),
    "TUPLE2": lambda machine, _: machine.tuple_of(machine.pop(2)),
    "TUPLE3": lambda machine, _: machine.tuple_of(machine.pop(3)),
    "TUPLE": lambda machine, _: machine.tuple_of(machine.pop_to_mark()),
    "APPEND": lambda machine, _: machine.append(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    "BUILD": _Machine.build,
}
