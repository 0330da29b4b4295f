"""The argument parser of the commands, and types of arguments."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

from .._system.invocation import as_called, command_line
from ..errors import did_you_mean, printable, shown

_UNKNOWN = "unrecognized arguments: "


class ParagraphFormatter(argparse.HelpFormatter):
    """Paragraphs of the help are filled to the terminal's width; indented lines stay lines.

    A long indented line goes on below, further in; a command stays in one piece, to be copied.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = []
        for line in _paragraphs(text):
            inner = indent + " " * (len(line) - len(line.lstrip()))
            if line.lstrip().startswith(("gpt2fast ", "python -m ")) or not line:
                filled.append(indent + line)
            elif line[0].isspace():
                filled += textwrap.wrap(
                    line.lstrip(), width, initial_indent=inner, subsequent_indent=inner + "    "
                )
            else:
                filled += textwrap.wrap(
                    line, width, initial_indent=indent, subsequent_indent=indent
                )
        return "\n".join(filled)


def _paragraphs(text: str) -> list[str]:
    found: list[str] = []
    for line in text.strip("\n").splitlines():
        inside = line and not line[0].isspace()
        if inside and found and found[-1] and not found[-1][0].isspace():
            found[-1] += " " + line
        else:
            found.append(line)
    return found


class CommandParser(argparse.ArgumentParser):
    """Parser of a command: a mistake is one line and exit code 2.

    Flags may be spelled with underscores. In texts of the help, `gpt2fast COMMAND` at the start of
    a line becomes what the user would type.

    Args:
        command: its name.
        settings: keyword arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, command: str = "", **settings: Any) -> None:
        settings.setdefault("formatter_class", ParagraphFormatter)
        for name in ("description", "epilog"):
            settings[name] = as_called(settings.get(name) or "")
        super().__init__(prog=command_line(command), **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        argv = list(sys.argv[1:] if args is None else args)
        end = argv.index("--") if "--" in argv else len(argv)
        return super().parse_known_args([*map(hyphenated, argv[:end]), *argv[end:]], namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stdout:
            file.write(message)  # argparse's own ignores that a disk is full
        else:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        if message.startswith(_UNKNOWN):
            given = message.removeprefix(_UNKNOWN).split()[0]
            message += did_you_mean(given.partition("=")[0], self._option_string_actions)
        self.exit(2, f"error: {printable(message)} (--help lists all options)\n")


def hyphenated(argument: str) -> str:
    """--top_k=5 as --top-k=5; all but flags stays as it is."""
    return re.sub(r"\A--\w[\w-]*(?==|\Z)", lambda name: name[0].replace("_", "-"), argument)


def count(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


count.__name__ = "integer"  # argparse says "invalid integer value"


def optional(kind: type) -> Callable[[str], Any]:
    """An argument of this type, or "none" for None."""

    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = kind.__name__
    return convert


def text_argument(given: str) -> str:
    """An argument that is a text (and no file's name): its bytes are UTF-8, whatever the locale is.

    Raises:
        argparse.ArgumentTypeError: they are not.
    """
    if not any("\udc80" <= character <= "\udcff" for character in given):
        return given
    try:
        return os.fsencode(given).decode("utf-8")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"{shown(given)} is not UTF-8 text (byte 0x{error.object[error.start]:02x})"
        ) from None
