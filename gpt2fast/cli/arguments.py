"""The argument parser of the command lines."""

from __future__ import annotations

import argparse
import os
import textwrap
from typing import NoReturn

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
            if line.lstrip().startswith("python -m ") or not line:
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


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake in one line and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        if message.startswith(_UNKNOWN):
            given = message.removeprefix(_UNKNOWN).split()[0]
            message += did_you_mean(given.partition("=")[0], self._option_string_actions)
        self.exit(2, f"error: {printable(message)} (--help lists all options)\n")


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


def usable_device(name: str) -> str:
    """The device that --device names, "auto" being a GPU where there is one.

    Raises:
        GenerationError: this computer has no such device.
    """
    import torch

    from ..errors import GenerationError

    usable = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        count = torch.accelerator.device_count()
        usable += [f"{accelerator.type}:{index}" for index in range(count)]
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu:0", *usable) and f"{name}:0" not in usable:
        raise GenerationError(
            f"--device {name}: this computer has {', '.join(usable)}; name one of these, or auto"
        )
    return name
