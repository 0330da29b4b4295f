"""JSON and YAML out of untrusted files.

The limits (bytes, values, depth, digits) come before the parser that could not stand what is beyond
them, or before anything else sees the result. What is read is small enough to be shown, compared
and walked through by recursion, every integer fits a float, and no name is there twice in one
object, since of two values one would be lost without a word.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Error, reason_of, shown
from .files import read_file

DEEPEST = 100
"""Objects and lists within one another."""
LONGEST_NUMBER = 300
"""Digits: a longer integer is beyond the largest float."""
LARGEST_JSON = 8 << 20
"""Bytes of a JSON file, if nothing else is said."""
MOST_VALUES = 500_000
"""Values in a JSON file, if nothing else is said: the index of a sharded gpt2-xl has 600."""

LARGEST_YAML = 1 << 20
"""Bytes of a YAML file."""
_MOST_YAML_VALUES = 10_000
# Everything that YAML takes for a number (and some words that are none).
_NUMBER_LIKE = re.compile(r"[-+.]?[0-9][-+._:,0-9a-fA-FoxXbB]*")


class Unreadable(ValueError):
    """A text that is not in its format, or beyond the limits; says which."""


def parse_json(
    text: str, *, most_values: int = MOST_VALUES, unique: bool = True, finite: bool = False
) -> Any:
    """The value that a JSON text stands for.

    Args:
        text: of JSON; numbers that JSON lacks (NaN, Infinity) are read, as Python writes them.
        most_values: most values that it may have.
        unique: refuse a name that is there twice in one object. Otherwise the last one counts.
        finite: refuse NaN, Infinity and what is as large, and names that are there twice.

    Raises:
        Unreadable: it is no JSON, or beyond the limits.
    """
    if len(text) > most_values and _count_values(text, most_values) > most_values:
        raise Unreadable(f"it holds more than {most_values} values, the most that are read")
    try:
        value = (_FINITE if finite else _STRICT if unique else _LENIENT).decode(text)
    except Unreadable:
        raise
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise Unreadable(f"it is not valid JSON: {error}") from None
    _check_depth(value)
    return value


def parse_yaml(text: str) -> Any:
    """The plain value that a YAML text stands for: no tags make objects of it.

    An alias stands for a copy of what it names, and is counted as that.

    Raises:
        Unreadable: it is no YAML, or beyond the limits.
    """
    import yaml

    try:
        _check_yaml(text)
        return yaml.safe_load(text)
    except Unreadable:
        raise
    except Exception as error:  # PyYAML's, and whatever a tag makes of a text that it is not for
        kind = "" if isinstance(error, yaml.YAMLError) else f"{type(error).__name__}: "
        raise Unreadable(f"it is not valid YAML: {kind}{reason_of(error)}") from None


def read_json(
    path: Path,
    error: type[Error] = ConfigError,
    largest: int = LARGEST_JSON,
    most_values: int = MOST_VALUES,
) -> dict[str, Any]:
    """The object in a JSON file; `error`, naming the file, for anything else."""
    values = read_json_value(path, error, largest, most_values)
    if not isinstance(values, dict):
        raise error(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_json_value(
    path: Path, error: type[Error], largest: int = LARGEST_JSON, most_values: int = MOST_VALUES
) -> Any:
    """The value in a JSON file of at most `largest` bytes; `error`, naming the file, otherwise."""
    try:
        return parse_json(read_text(path, error, largest), most_values=most_values)
    except Unreadable as reason:
        raise error(f"{path} cannot be read as JSON: {reason}; it may be damaged") from None


def read_yaml(path: Path, error: type[Error] = ConfigError) -> Any:
    """The content of a YAML file; `error`, naming the file, where it cannot be read."""
    try:
        return parse_yaml(read_text(path, error, LARGEST_YAML))
    except Unreadable as reason:
        raise error(f"{path} cannot be read as YAML: {reason}") from None


def read_text(path: Path, error: type[Error], largest: int) -> str:
    """The text of a UTF-8 file of at most `largest` bytes; `error`, naming the file, otherwise."""
    content = read_bytes(path, error, largest)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(
            f"{path} is not UTF-8 text (byte 0x{content[cause.start]:02X} at offset {cause.start})"
        ) from None


def read_bytes(path: Path, error: type[Error], largest: int) -> bytes:
    """The content of a file of at most `largest` bytes; `error`, naming the file, otherwise."""
    with unreadable_as(error, path):
        return read_file(path, largest)


@contextmanager
def unreadable_as(error: type[Error], path: Path) -> Iterator[None]:
    """Raise `error`, which names the file, where the block cannot open or read it."""
    try:
        yield
    except FileNotFoundError:
        raise error(f"{path} is missing") from None
    except Error:
        raise
    except (OSError, ValueError) as cause:  # a ValueError: a name with a NUL
        raise error(f"{path} cannot be read: {reason_of(cause)}") from None


def is_file_name(name: object) -> bool:
    """True for the name of a file in a folder that is known: nothing that leads out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {*name} & {*"/\\\0"}


def _count_values(text: str, most: int) -> int:
    """About how many values a JSON text has: objects and lists, and what commas separate."""
    count = sum(map(text.count, "[{,"))
    if count > most and '"' in text:
        # Texts may hold any number of these; between the quotation marks is what counts.
        plain = text.replace("\\\\", "").replace('\\"', "")
        if plain.count('"') <= 4 * most:
            plain = "".join(plain.split('"')[::2])
            count = sum(map(plain.count, "[{,"))
    return count


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise Unreadable(f"the name {shown(twice)} is there twice in one object")
    return content


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise Unreadable(
            f"it holds a number of {len(digits)} digits; {LONGEST_NUMBER} are the most"
        )
    return int(digits)


def _no_number(word: str) -> Any:
    raise Unreadable(f"it holds {word}, which is no finite number")


def _finite(digits: str) -> float:
    value = float(digits)
    return _no_number(digits[:40]) if math.isinf(value) else value


_FINITE = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_integer,
    parse_float=_finite,
    parse_constant=_no_number,
)
_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
_LENIENT = json.JSONDecoder(parse_int=_integer)


def _check_depth(value: Any) -> None:
    level = _inside([value])
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise _too_deep()


def _inside(container: dict[str, Any] | list[Any]) -> list[Any]:
    values = container.values() if isinstance(container, dict) else container
    return [value for value in values if type(value) in (dict, list)]


def _too_deep() -> Unreadable:
    return Unreadable(f"it is nested more than {DEEPEST} deep")


def _check_yaml(text: str) -> None:
    """Walk through a YAML text's events, which takes no recursion and makes no values."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    reading = _YamlLimits()
    for event in yaml.parse(text, Loader=loader):
        reading.take(event)


class _YamlLimits:
    """Counts the values of a YAML text, those of aliases included."""

    def __init__(self) -> None:
        self.count = 0
        # For each mapping or list that is still open: its anchor, number of values before it,
        # depth within it, names so far (None for a list), and True if a name comes next.
        self.open: list[_Open] = []
        self.sizes: dict[str, tuple[int, int]] = {}  # anchor -> values, depth

    def take(self, event: Any) -> None:
        import yaml

        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.sizes:
                raise Unreadable(
                    f"the alias *{shown(event.anchor)[1:-1]} names nothing that ends before it"
                )
            size, depth = self.sizes[event.anchor]
            self._value(None, size, depth)
        elif isinstance(event, yaml.ScalarEvent):
            value = event.value
            plain = event.implicit[0] or event.tag is not None
            if plain and len(value) > LONGEST_NUMBER and _NUMBER_LIKE.fullmatch(value):
                raise Unreadable(
                    f"it holds a number of {len(value)} characters; {LONGEST_NUMBER} are the most"
                )
            self._value(value, 1, 0)
            if event.anchor:
                self.sizes[event.anchor] = (1, 0)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            self._value(None, 1, 0)
            if event.anchor:
                self.sizes.pop(event.anchor, None)
            names: set[str] | None = set() if isinstance(event, yaml.MappingStartEvent) else None
            self.open.append(_Open(event.anchor, self.count, names))
            self._check_depth(0)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            closed = self.open.pop()
            depth = 1 + closed.depth
            if self.open:
                self.open[-1].depth = max(self.open[-1].depth, depth)
            if closed.anchor:
                self.sizes[closed.anchor] = (1 + self.count - closed.before, depth)

    def _value(self, text: str | None, size: int, depth: int) -> None:
        self.count += size
        if self.count > _MOST_YAML_VALUES:
            raise Unreadable(
                f"it holds more than {_MOST_YAML_VALUES} values, aliases counted as what they name"
            )
        self._check_depth(depth)
        if not self.open:
            return
        around = self.open[-1]
        around.depth = max(around.depth, depth)
        if around.names is None:
            return
        around.name_next = not around.name_next
        if around.name_next or text is None:  # a value has come, or a name that is no text
            return
        if text in around.names and text != "<<":
            raise Unreadable(f"the name {shown(text)} is there twice in one mapping")
        around.names.add(text)

    def _check_depth(self, further: int) -> None:
        if len(self.open) + further > DEEPEST:
            raise _too_deep()


class _Open:
    """A mapping or list that has not ended yet."""

    def __init__(self, anchor: str | None, before: int, names: set[str] | None) -> None:
        self.anchor, self.before, self.names = anchor, before, names
        self.depth = 0
        self.name_next = True
