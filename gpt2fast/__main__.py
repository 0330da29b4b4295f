"""What can be run: python -m gpt2fast"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ._system.output import say
from .cli.arguments import OneLineParser
from .cli.command import command

_COMMANDS = """\
python -m gpt2fast.generate   continue a text
python -m gpt2fast.prepare    turn text into tokens for training
python -m gpt2fast.train      train, fine-tune, resume
python -m gpt2fast.report     compare runs, in one HTML file
python -m gpt2fast.evaluate   perplexity of a text, and the tasks of GPT-2's paper
python -m gpt2fast.tune       search for good settings
python -m gpt2fast.doctor     which implementation of each op runs here, and why
python -m gpt2fast.benchmark  how fast it runs here, and how much of the memory's speed that is

Each has --help."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """List the commands; returns the exit code."""
    parser = OneLineParser(
        prog="python -m gpt2fast",
        description=_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    say(_COMMANDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
