"""What the text must be: a JSON schema, a regular expression, a grammar, or one of some texts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .._system.parsing import read_text
from ..errors import GenerationError
from .arguments import text_argument
from .command import UsageError
from .sampling_flags import flag

if TYPE_CHECKING:
    from ..inference.generator import Generator
    from ..inference.grammar import Grammar

_FLAGS = ("json_schema", "regex", "grammar", "choice")


def add_constraint_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group of flags, of which one may be given."""
    one = parser.add_argument_group("form of the text (one of these)")
    one.add_argument(
        "--json-schema", metavar="FILE", help="JSON that the JSON Schema in this file accepts"
    )
    one.add_argument(
        "--regex", type=text_argument, metavar="TEXT",
        help="what this regular expression matches as a whole",
    )  # fmt: skip
    one.add_argument(
        "--grammar", metavar="FILE",
        help="what fits the grammar in this file, written in Lark or in llama.cpp's GBNF",
    )  # fmt: skip
    one.add_argument(
        "--choice", action="append", type=text_argument, metavar="TEXT",
        help="one of these texts; to be repeated",
    )  # fmt: skip


def constraint_of(args: argparse.Namespace) -> Callable[[Generator], Grammar] | None:
    """What makes the grammar that the flags ask for, or None.

    Raises:
        UsageError: a file that cannot be read, or beams, which follow no grammar. The returned
            function raises it for what is no such grammar.
    """
    given = [name for name in _FLAGS if getattr(args, name) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise UsageError(f"{' and '.join(map(flag, given))} do not go together: give one of them")
    (name,) = given
    if args.num_beams > 1:
        raise UsageError(f"{flag(name)} and --num-beams do not go together: leave one of them out")
    value = getattr(args, name)
    if name in ("json_schema", "grammar"):
        from ..inference.grammar import LARGEST

        value = read_text(Path(value), UsageError, LARGEST)

    def make(generator: Generator) -> Grammar:
        from ..inference.grammar import Grammar

        makers = {
            "json_schema": Grammar.json_schema,
            "regex": Grammar.regex,
            "grammar": Grammar.lark,
            "choice": Grammar.choices,
        }
        try:
            return makers[name](value, generator.tokenizer)
        except GenerationError as error:
            place = f" {getattr(args, name)}" if name in ("json_schema", "grammar") else ""
            raise UsageError(f"{flag(name)}{place}: {error}") from None

    return make
