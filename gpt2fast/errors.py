"""The errors that a user can cause, all derived from one class, and how values read in them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

_LONGEST_MESSAGE = 4000
_OUT_OF_MEMORY = (
    *("out of memory", "allocate memory", "not enough memory"),
    *("storage size calculation", "bad_alloc"),
)


def printable(text: str) -> str:
    """`text` without what moves a terminal's cursor, changes its colors or reverses its lines.

    Every character that is not printable is escaped, new lines aside; lone surrogates, which
    stand for bytes in the names of files, can be written after that.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def shown(value: object, longest: int = 80) -> str:
    """A value out of a file, for a message: its repr, which is one line, and that not a long one.

    Args:
        value: a name, a number, or whatever else a file had in its place.
        longest: characters; what is longer is cut.
    """
    if isinstance(value, (str, bytes)):
        value = value[: longest + 1]  # not a gigabyte of escapes that are cut afterward
    elif type(value) is int and value.bit_length() > 4 * longest:
        return f"an integer of {value.bit_length()} bits"  # whose digits Python may not write
    try:
        text = printable(repr(value))
    except (RecursionError, ValueError):  # a long integer within something
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= longest else text[: longest - 1] + "…"


def reason_of(error: BaseException, longest: int = 300) -> str:
    """One line that says why something failed: the system's words, the exception's, or its type.

    Args:
        error: the exception.
        longest: characters of the exception's own words.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:longest] or type(error).__name__


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of a message about `given`, an unknown name: the most similar of `known`, if any."""
    similar = difflib.get_close_matches(given, list(known), n=1)
    return f"; did you mean {similar[0]}?" if similar else ""


def is_out_of_memory(error: BaseException) -> bool:
    """True if Python, torch or the C++ library ran out of memory, of a CPU or a GPU."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(words in message for words in _OUT_OF_MEMORY)


UTF8_LOCALE = "set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
"""Remedy for names that the locale's encoding does not have."""


def why_not_written(name: object) -> str | None:
    """A reason not to write the name of a file in a text, and a remedy; None where there is none.

    Python decodes bytes that are not in the locale's encoding as lone surrogates.
    """
    if not isinstance(name, str):
        return None
    try:
        name.encode("utf-8")
        return None
    except UnicodeEncodeError:
        pass
    try:
        os.fsencode(name).decode("utf-8")
    except UnicodeError:
        return f"{shown(name)} is not UTF-8: rename it, or make a link to it (ln -s) and name that"
    return f"{shown(name)} cannot be read in this locale: {UTF8_LOCALE}"


class Error(ValueError):
    """A mistake in what gpt2fast was given; its text names the value, the limit and the way out.

    The text can be printed as it is: names out of files keep no control characters in it.

    Args:
        arguments: the text, and what else an exception takes.
    """

    def __init__(self, *arguments: object) -> None:
        if arguments and isinstance(arguments[0], str):
            text = printable(arguments[0])
            if len(text) > _LONGEST_MESSAGE:
                kept = _LONGEST_MESSAGE // 2
                text = f"{text[:kept]} … {text[-kept:]}"
            arguments = (text, *arguments[1:])
        super().__init__(*arguments)


class ConfigError(Error):
    """A field of a model or training configuration has a wrong type or value."""


class ArgumentError(Error):
    """Arguments of an op, a module or the model do not fit together."""


class WeightsError(Error):
    """A checkpoint cannot be found, read, or fitted to the model."""


class TokenizerError(Error):
    """A tokenizer's files are broken, or a text or token id cannot be converted."""


class MissingTokenizerError(TokenizerError):
    """There are no files of a tokenizer, where everything else may be in order."""


class DataError(Error):
    """Training data is missing, malformed, too short, or belongs to another tokenizer."""


class GenerationError(Error):
    """A generation request cannot be carried out as asked."""


class EngineBusy(Error):
    """An engine takes no more jobs for now: as many wait as may, or it is closed."""


class BackendError(Error):
    """The backend that was asked for is unknown or cannot run this op here."""
