"""Kinds of fields of a request's JSON: each checks a value, and describes itself as JSON Schema.

A check returns the value as the server uses it, or raises a `Refusal` that names the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import did_you_mean, shown
from .failures import Refusal

Schema = dict[str, Any]


class Kind(Protocol):
    """What a value of a request must be."""

    def check(self, value: Any, name: str) -> Any:
        """The value; raises a `Refusal` that names the field where it is something else."""

    def schema(self) -> Schema:
        """The same as JSON Schema."""


def refuse(value: Any, name: str, wanted: str) -> Refusal:
    """The refusal of a field's value."""
    return Refusal(f"{name} is {shown(value)}; it must be {wanted}", param=name)


@dataclass(frozen=True)
class Flag:
    """true or false."""

    def check(self, value: Any, name: str) -> bool:
        if type(value) is not bool:
            raise refuse(value, name, "true or false")
        return value

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Whole:
    """A whole number in a range."""

    low: int
    high: int
    limit: str = ""
    """The option of the server that sets the upper end."""

    def check(self, value: Any, name: str) -> int:
        if type(value) is float and value.is_integer():  # 1.0 is an integer of JSON Schema
            value = int(value)
        if type(value) is not int or not self.low <= value <= self.high:
            reason = f" (the server's {self.limit})" if self.limit else ""
            wanted = f"a whole number from {self.low} to {self.high}{reason}"
            raise refuse(value, name, wanted)
        return value

    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class Number:
    """A finite number in a range."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    """The lower end is not in the range."""
    below: bool = False
    """The upper end is not in the range."""

    def check(self, value: Any, name: str) -> float:
        number = float(value) if type(value) in (int, float) else math.nan
        is_edge = (self.above and number == self.low) or (self.below and number == self.high)
        if not self.low <= number <= self.high or math.isinf(number) or is_edge:
            raise refuse(value, name, f"a finite number {self._range()}".rstrip())
        return number

    def _range(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.above else 'of at least'} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{'below' if self.below else 'at most'} {self.high:g}")
        return " and ".join(parts)

    def schema(self) -> Schema:
        found: Schema = {"type": "number"}
        if self.low > -math.inf:
            found["exclusiveMinimum" if self.above else "minimum"] = self.low
        if self.high < math.inf:
            found["exclusiveMaximum" if self.below else "maximum"] = self.high
        return found


@dataclass(frozen=True)
class Text:
    """A text of UTF-8."""

    shortest: int = 0
    longest: int | None = None

    def check(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise refuse(value, name, "a text")
        if len(value) < self.shortest:
            raise refuse(value, name, f"a text of at least {self.shortest} character")
        if self.longest is not None and len(value) > self.longest:
            raise Refusal(
                f"{name} has {len(value)} characters; {self.longest} are the most", param=name
            )
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise Refusal(
                    f"{name} holds the lone surrogate U+{ord(value[error.start]):04X} at position "
                    f"{error.start}, which is no character: remove or replace it",
                    param=name,
                ) from None
        return value

    def schema(self) -> Schema:
        found: Schema = {"type": "string"}
        if self.shortest:
            found["minLength"] = self.shortest
        if self.longest is not None:
            found["maxLength"] = self.longest
        return found


@dataclass(frozen=True)
class OneOf:
    """One of some words."""

    words: tuple[str, ...]

    def check(self, value: Any, name: str) -> str:
        if not isinstance(value, str) or value not in self.words:
            meant = did_you_mean(value, self.words) if isinstance(value, str) else ""
            raise refuse(value, name, " or ".join(map(repr, self.words)) + meant)
        return value

    def schema(self) -> Schema:
        return {"type": "string", "enum": list(self.words)}


@dataclass(frozen=True)
class ListOf:
    """A list of values of one kind."""

    item: Kind
    most: int
    least: int = 0

    def check(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list):
            raise refuse(value, name, "a list")
        if not self.least <= len(value) <= self.most:
            raise Refusal(
                f"{name} has {len(value)} items; it may have {self.least} to {self.most}",
                param=name,
            )
        return [self.item.check(item, f"{name}[{place}]") for place, item in enumerate(value)]

    def schema(self) -> Schema:
        found: Schema = {"type": "array", "items": self.item.schema(), "maxItems": self.most}
        return {**found, "minItems": self.least} if self.least else found


@dataclass(frozen=True)
class Tokens:
    """A list of token ids, checked at the speed of a list."""

    vocabulary: int
    most: int
    limit: str
    """What sets the length."""
    least: int = 1

    def check(self, value: Any, name: str) -> list[int]:
        if not isinstance(value, list) or len(value) < self.least:
            raise refuse(value, name, f"a list of at least {self.least} token ids")
        if len(value) > self.most:
            raise Refusal(
                f"{name} has {len(value)} tokens; {self.most} are the most ({self.limit})",
                param=name,
                code="context_length_exceeded",
            )
        for place, token in enumerate(value):
            if type(token) is not int or not 0 <= token < self.vocabulary:
                id = Whole(0, self.vocabulary - 1, "model's vocabulary")
                value[place] = id.check(token, f"{name}[{place}]")
        return value

    def schema(self) -> Schema:
        token = {"type": "integer", "minimum": 0, "maximum": self.vocabulary - 1}
        return {"type": "array", "items": token, "minItems": self.least, "maxItems": self.most}


@dataclass(frozen=True)
class Inputs:
    """One text or several, one list of tokens or several; checked, it is a list of them.

    Args:
        text, tokens: the kinds of each.
        most: of them.
    """

    text: Text
    tokens: Tokens
    most: int

    def check(self, value: Any, name: str) -> list[str] | list[list[int]]:
        if isinstance(value, str):
            return [self.text.check(value, name)]
        if isinstance(value, list) and value and isinstance(value[0], int | float):
            return [self.tokens.check(value, name)]
        if isinstance(value, list) and value:
            kind: Kind = self.text if isinstance(value[0], str) else self.tokens
            return ListOf(kind, self.most).check(value, name)
        raise refuse(
            value, name, "a text, a list of texts, a list of token ids, or a list of such lists"
        )

    def schema(self) -> Schema:
        several = [ListOf(kind, self.most, 1).schema() for kind in (self.text, self.tokens)]
        return {"anyOf": [self.text.schema(), several[0], self.tokens.schema(), several[1]]}


@dataclass(frozen=True)
class OneOrMore:
    """A value or a list of such values; checked, it is a list."""

    item: Kind
    most: int

    def check(self, value: Any, name: str) -> list[Any]:
        several = ListOf(self.item, self.most)
        return (
            several.check(value, name)
            if isinstance(value, list)
            else [self.item.check(value, name)]
        )

    def schema(self) -> Schema:
        return {"anyOf": [self.item.schema(), ListOf(self.item, self.most).schema()]}


@dataclass(frozen=True)
class AnyObject:
    """An object whose content is somebody else's business."""

    def check(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refuse(value, name, "an object")
        return value

    def schema(self) -> Schema:
        return {"type": "object"}


@dataclass(frozen=True)
class Member:
    """A field of an object."""

    kind: Kind
    about: str = ""
    required: bool = False
    default: Any = None
    """What null, and leaving it out, mean."""


@dataclass(frozen=True)
class Structure:
    """An object with known fields. null is the same as leaving a field out."""

    members: Mapping[str, Member]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Fields of OpenAI's protocol that this server does not have, and why, or what else to do."""
    about: str = ""

    def check(self, value: Any, name: str) -> dict[str, Any]:
        prefix = f"{name}." if name else ""
        if not isinstance(value, dict):
            raise refuse(value, name or "the body", "an object of JSON")
        for given, content in value.items():
            if given not in self.members:
                self._refuse(given, content, prefix)
        found = {}
        for key, member in self.members.items():
            content = value.get(key)
            if content is not None:
                found[key] = member.kind.check(content, prefix + key)
            elif member.required:
                there = "is null" if key in value else "is missing"
                raise Refusal(f"{prefix + key} {there}: {member.about}", param=prefix + key)
            else:
                found[key] = member.default
        return found

    def _refuse(self, given: str, content: Any, prefix: str) -> None:
        param = prefix + given[:80]
        if given not in self.refused:
            meant = did_you_mean(given[:80], self.members)
            text = f"there is no field {shown(prefix + given)}{meant or ': leave it out'}"
            raise Refusal(text, param=param, code="unknown_parameter")
        if content not in _NOTHING:
            raise Refusal(f"{param}: {self.refused[given]}", param=param, code="unsupported")

    def schema(self) -> Schema:
        properties = {}
        for key, member in self.members.items():
            inner = member.kind.schema()
            if not member.required:
                inner = _nullable(inner)
            if member.default is not None:
                inner["default"] = member.default
            if member.about:
                inner["description"] = member.about
            properties[key] = inner
        for key, reason in self.refused.items():
            nothing = {"enum": list(_NOTHING), "description": f"Not supported: {reason}."}
            properties[key] = nothing
        required = [key for key, member in self.members.items() if member.required]
        found: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
        return {**found, "required": required} if required else found


@dataclass(frozen=True)
class Variants:
    """An object whose field `type` says which other fields it has."""

    kinds: Mapping[str, Structure]

    def check(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise refuse(value, name, "an object with a type")
        kind = OneOf(tuple(self.kinds)).check(value.get("type"), f"{name}.type")
        rest = {key: inner for key, inner in value.items() if key != "type"}
        return {"type": kind, **self.kinds[kind].check(rest, name)}

    def schema(self) -> Schema:
        options = []
        for kind, structure in self.kinds.items():
            found = structure.schema()
            found["properties"] = {"type": {"const": kind}, **found["properties"]}
            found["required"] = ["type", *found.get("required", ())]
            options.append(found)
        return {"anyOf": options}


_NOTHING: tuple[Any, ...] = (None, False, [], {})
"""Values of a field that ask for nothing. (0 == False, and asks for as little.)"""


def _nullable(schema: Schema) -> Schema:
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    found = {**schema, "type": [schema["type"], "null"]}
    if "enum" in found:
        found["enum"] = [*found["enum"], None]
    return found
