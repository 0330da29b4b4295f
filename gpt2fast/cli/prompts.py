"""The texts to continue: one, or a file of prompts, whose lines may have options of their own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .._system.parsing import Unreadable, parse_json
from ..errors import Error, GenerationError, shown
from ..sampling import DEFAULTS, overridden
from .sampling_flags import OF_A_TEXT

_TEXTS = ("stop", "bad_words")
OPTIONS = (*OF_A_TEXT, "logit_bias", "bad_words_ids", *_TEXTS)
"""Options that a line may set for its own continuation."""

_RESULTS = (
    "sample", "text", "finish_reason", "prompt_tokens", "new_tokens", "tokens", "index", "logprobs",
    "top_logprobs", "prompt_token_ids", "prompt_logprobs", "prompt_top_logprobs",
)  # fmt: skip
"""Written by --json beside the prompt; its output may be read again."""


class PromptFileError(GenerationError):
    """A line of a file of prompts that cannot be understood."""


@dataclass(frozen=True)
class BadLine:
    """A line of a file of prompts that cannot be understood."""

    index: int
    """Its number, counted from 0."""
    labels: Mapping[str, Any]
    """Its "id", if that could be read."""
    error: Error
    """What is wrong with it; names the file and the line."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue, with the options of its line."""

    text: str
    index: int | None = None
    """Number of its line, counted from 0; None where it comes from no file."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """Goes to the output as it is: its "id", if it has one."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Those of `OPTIONS` that its line sets."""


def has_prompt(args: argparse.Namespace) -> bool:
    """True if there is a text to read; beside --interactive and --save it has to be named."""
    named = args.words or args.prompt is not None or args.prompts_file is not None
    return bool(named) or not (args.interactive or args.save is not None)


def read_prompts(args: argparse.Namespace, options: Mapping[str, Any]) -> list[Prompt]:
    """The prompts that the command line names, or standard input.

    Raises:
        PromptFileError, GenerationError: as `parse_prompts`; or a file cannot be read.
    """
    if args.prompts_file is not None:
        return parse_prompts(args.prompts_file, _read(args.prompts_file), options)
    if args.prompt is not None:
        return [Prompt(args.prompt)]
    if args.words:
        return [Prompt(" ".join(args.words))]
    # The end of line that echo and editors add is not part of the text.
    return [Prompt(_read("-").removesuffix("\n").removesuffix("\r"))]


def read_lines(name: str, options: Mapping[str, Any]) -> tuple[bytes, list[Prompt | BadLine]]:
    """The content of a file of prompts, and what is on its lines; a mistake is its line's alone.

    Args:
        name: the file's; "-" is standard input.
        options: as `shared` of `parse_prompts`.

    Raises:
        GenerationError: the file cannot be read, or there is no prompt at all.
    """
    content = _read_bytes(name)
    text = content.decode("utf-8-sig", "surrogateescape")
    return content, list(parse_lines(name, text, options))


def _read(name: str) -> str:
    try:
        return _read_bytes(name).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        source = "standard input" if name == "-" else name
        raise GenerationError(f"{source} is not UTF-8 text: {error}") from error


def _read_bytes(name: str) -> bytes:
    try:
        if name == "-":
            return sys.stdin.buffer.read()
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        raise GenerationError(f"{name} cannot be read: {error.strerror}") from error


def parse_prompts(name: str, content: str, shared: Mapping[str, Any]) -> list[Prompt]:
    """The prompts of a file, one for each line; blank lines of a .jsonl file are passed over.

    Args:
        name: the file's name; lines are JSON where it ends in .jsonl.
        content: its text.
        shared: fields of `SamplingOptions`, for whatever a line does not set.

    Raises:
        PromptFileError: a line is wrong; it is named, with the mistake.
        GenerationError: there is no prompt at all.
    """
    prompts = []
    for line in parse_lines(name, content, shared):
        if isinstance(line, BadLine):
            raise line.error
        prompts.append(line)
    return prompts


def parse_lines(name: str, content: str, shared: Mapping[str, Any]) -> Iterator[Prompt | BadLine]:
    """The prompts of a file, and the lines that are none, in their order.

    Args:
        name, content, shared: as in `parse_prompts`.

    Raises:
        GenerationError: there is no prompt at all.
    """
    # Not splitlines(), which takes a form feed and U+2028 for ends of lines.
    lines = [line.removesuffix("\r") for line in content.removesuffix("\n").split("\n")]
    is_blank = not any(line.strip() for line in lines)
    if not content or (is_blank and name.lower().endswith(".jsonl")):
        raise GenerationError(f"{name} has no prompts; put one on each line")
    is_json = name.endswith(".jsonl")
    for index, line in enumerate(lines):
        place = f"{name}, line {index + 1}"
        labels: dict[str, Any] = {}
        try:
            _check_bytes(place, line)
            if not is_json:
                yield Prompt(line, index)
            elif line.strip():
                yield _parse(place, index, line, shared, labels)
        except GenerationError as error:
            yield BadLine(index, labels, error)


def _check_bytes(place: str, line: str) -> None:
    """Refuse bytes that are not UTF-8, which "surrogateescape" has let through."""
    for character in line if not line.isascii() else "":
        if "\udc80" <= character <= "\udcff":
            raise GenerationError(
                f"{place} is not UTF-8 text: it holds the byte 0x{ord(character) - 0xDC00:02X}"
            )


def _parse(
    place: str, index: int, line: str, shared: Mapping[str, Any], labels: dict[str, Any]
) -> Prompt:
    """The prompt on a line; its "id" goes into `labels`, even if it has a mistake."""
    try:
        value = parse_json(line)
    except Unreadable as error:
        raise GenerationError(
            f'{place}: {shown(line)} is neither a JSON text nor an object with a "prompt": {error}'
        ) from None
    values = dict(value) if isinstance(value, dict) else {"prompt": value}
    if "id" in values:
        labels["id"] = values.pop("id")
    text = values.pop("prompt", None)
    if not isinstance(text, str):
        raise GenerationError(
            f'{place}: {shown(line)} is neither a JSON text nor an object with a "prompt"'
        )
    if "finish_reason" in values:
        for result in _RESULTS:
            values.pop(result, None)
    values.pop("index", None)
    unknown = [option for option in values if option not in OPTIONS]
    if unknown:
        raise PromptFileError(
            f"{place}: there is no option {shown(unknown[0])}; a line takes prompt, id, "
            f"{', '.join(OPTIONS)}"
        )
    for name in _TEXTS:
        given = values.get(name)
        texts = given if isinstance(given, list) else [] if given is None else [given]
        if not all(isinstance(one, str) and one for one in texts):
            raise PromptFileError(
                f"{place}: {name} is {shown(given)}; it must be a text that is not empty, or a "
                "list of them"
            )
    own = {name: value for name, value in values.items() if name not in _TEXTS}
    try:
        DEFAULTS.of_call({}, overridden(shared, own))
    except GenerationError as error:
        raise PromptFileError(f"{place}: {error}") from None
    return Prompt(text, index, labels, values)
