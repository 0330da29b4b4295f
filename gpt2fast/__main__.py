"""All commands in one: `gpt2fast generate …` and `python -m gpt2fast generate …`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from ._system.invocation import command_line
from ._system.output import deliver
from .cli.arguments import CommandParser
from .cli.command import COMMANDS, command, fail, leave
from .errors import did_you_mean


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, or list all; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return int(importlib.import_module(f".cli.{argv[0]}", __package__).main(argv[1:]))
    return _list(argv)


@command()
def _list(argv: Sequence[str] | None = None) -> int:
    name = argv[0] if argv else ""
    if name and not name.startswith("-"):
        meant = did_you_mean(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        return fail(f"there is no command {name!r}{meant} (--help lists all commands)", 2)
    width = max(len(command_line(name)) for name in COMMANDS)
    lines = [f"{command_line(name):<{width}}  {about}" for name, about in COMMANDS.items()]
    about = "\n".join([*lines, "", "Each has --help."])
    parser = CommandParser(
        usage="%(prog)s COMMAND …",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gpt2fast {__version__}")
    parser.parse_args(argv)
    deliver(about)
    return 0


def run() -> NoReturn:
    """The entry point of the console command `gpt2fast`."""
    leave(main())


if __name__ == "__main__":
    run()
