"""A conversation at a prompt: the lines typed and the model's answers are one growing text."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import fields
from typing import Any

from .._system.files import atomic_write_text
from .._system.output import complain, held
from ..errors import Error
from ..inference.generator import Generator
from ..sampling import DEFAULTS, SamplingOptions, overridden
from .arguments import optional
from .sampling_flags import OF_A_TEXT

_HELP = """\
Type a text and press Enter: the model goes on from there, and sees all that came before.
Enter alone lets it go on with its own text. Ctrl-C stops an answer, Ctrl-D leaves.
  /set                      show the options
  /set temperature 0.7      change one (none switches it off)
  /reset                    forget the text so far
  /save FILE                write the text so far to a file
  /help                     this list
  /quit                     leave"""


class Conversation:
    """Reads lines, streams answers to standard output, obeys commands.

    Args:
        generator: it answers.
        options: keyword arguments of `Generator.stream`.
    """

    def __init__(self, generator: Generator, options: dict[str, Any]):
        self._generator = generator
        self._options = options
        self._turn = 0
        self.text = ""
        """Everything typed and answered."""

    def run(self, first: str | None = None) -> int:
        """Converse until the input ends; `first` is answered before. Returns the exit code."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() a history and editing
        if sys.stdin.isatty():
            complain("/help lists the commands, Ctrl-D leaves")
        if first is not None:
            print(first, end="")
            self._answer(first)
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
                if not line.startswith("/"):
                    self._answer(line)
                elif self._command(*line.split(maxsplit=1)):
                    return 0
            except EOFError:
                if sys.stdin.isatty():
                    complain("")
                return 0
            except KeyboardInterrupt:
                complain("\n(Ctrl-D or /quit leaves)")
            except UnicodeDecodeError as error:
                complain(f"error: that line is not UTF-8 text: {error}")

    def _answer(self, line: str) -> None:
        before = self.text
        if line and before and not before.endswith("\n"):
            before += "\n"
        options = dict(self._options)
        if options.get("seed") is not None:
            # Not the same draws for every answer.
            options["seed"] += self._turn
        self._turn += 1
        try:
            pieces = self._generator.stream(before + line, **options)
        except Error as error:
            complain(f"error: {error}")
            return
        with held():
            try:
                for piece in pieces:
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                pass
            print(flush=True)
        self.text = before + line + pieces.text

    def _command(self, name: str, argument: str = "") -> bool:
        """Obey a command; True ends the conversation."""
        if name == "/quit":
            return True
        if name == "/help":
            complain(_HELP)
        elif name == "/reset":
            self.text = ""
            complain("the text so far is forgotten")
        elif name == "/save":
            self._save(argument.strip())
        elif name == "/set":
            self._set(argument)
        else:
            complain(f"error: there is no command {name}; /help lists them")
        return False

    def _save(self, path: str) -> None:
        if not path:
            complain("error: /save needs a file name, as in /save story.txt")
            return
        try:
            atomic_write_text(path, self.text)
        except OSError as error:
            complain(f"error: {path} cannot be written: {error.strerror}")
        else:
            complain(f"{len(self.text)} characters written to {path}")

    def _set(self, argument: str) -> None:
        if not argument:
            for name in OF_A_TEXT:
                complain(f"  {name} {_shown(getattr(self._sampling(self._options), name))}")
            return
        name, _, word = argument.partition(" ")
        name, word = name.replace("-", "_"), word.strip()
        if name not in OF_A_TEXT:
            complain(f"error: there is no option {name}; choose from {', '.join(OF_A_TEXT)}")
            return
        try:
            options = overridden(self._options, {name: optional(OF_A_TEXT[name])(word)})
            self._sampling(options)
        except Error as error:
            complain(f"error: {error}")
        except ValueError:
            kind_name = "a whole number" if OF_A_TEXT[name] is int else "a number"
            complain(f"error: {name} takes {kind_name} or none, not {word!r}")
        else:
            self._options = options

    def _sampling(self, options: dict[str, Any]) -> SamplingOptions:
        known = [field.name for field in fields(SamplingOptions)]
        given = {name: value for name, value in options.items() if name in known}
        return DEFAULTS.of_call(self._generator.model.generation_config, given)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
