"""A conversation at a prompt: what is typed and what the model answers is one growing text."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from typing import Any

from .errors import Error
from .files import atomic_write_text
from .generator import Generator
from .sampling import SamplingOptions

_HELP = """\
Type a text and press Enter: the model goes on from there, and sees all that came before.
Enter alone lets it go on with its own text. Ctrl-C stops an answer, Ctrl-D leaves.
  /set                      show the options
  /set temperature 0.7      change one (none switches it off)
  /reset                    forget the text so far
  /save FILE                write the text so far to a file
  /help                     this list
  /quit                     leave"""
_INTEGERS = ("max_new_tokens", "top_k", "no_repeat_ngram_size", "seed")
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")


class Conversation:
    """Reads lines, streams answers to standard output, obeys commands.

    Args:
        generator: what answers.
        options: keyword arguments of `Generator.stream`.
    """

    def __init__(self, generator: Generator, options: dict[str, Any]):
        self._generator = generator
        self._options = options
        self._turn = 0
        self.text = ""
        """All that was typed and answered."""

    def run(self, first: str | None = None) -> int:
        """Converse until the input ends; `first` is answered before. Returns the exit code."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() a history and editing
        if sys.stdin.isatty():
            print("/help lists the commands, Ctrl-D leaves", file=sys.stderr)
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
                    print(file=sys.stderr)
                return 0
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit leaves)", file=sys.stderr)
            except UnicodeDecodeError as error:
                print(f"error: that line is not UTF-8 text: {error}", file=sys.stderr)

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
            print(f"error: {error}", file=sys.stderr)
            return
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        print(flush=True)
        self.text = before + line + pieces.text

    def _command(self, name: str, argument: str = "") -> bool:
        """Obey a command; returns whether it ends the conversation."""
        if name == "/quit":
            return True
        if name == "/help":
            print(_HELP, file=sys.stderr)
        elif name == "/reset":
            self.text = ""
            print("the text so far is forgotten", file=sys.stderr)
        elif name == "/save":
            self._save(argument.strip())
        elif name == "/set":
            self._set(argument)
        else:
            print(f"error: there is no command {name}; /help lists them", file=sys.stderr)
        return False

    def _save(self, path: str) -> None:
        if not path:
            print("error: /save needs a file name, as in /save story.txt", file=sys.stderr)
            return
        try:
            atomic_write_text(path, self.text)
        except OSError as error:
            print(f"error: {path} cannot be written: {error.strerror}", file=sys.stderr)
        else:
            print(f"{len(self.text)} characters written to {path}", file=sys.stderr)

    def _set(self, argument: str) -> None:
        if not argument:
            for name in (*_INTEGERS, *_NUMBERS):
                print(f"  {name} {_shown(self._options.get(name))}", file=sys.stderr)
            return
        name, _, word = argument.partition(" ")
        name, word = name.replace("-", "_"), word.strip()
        if name not in _INTEGERS + _NUMBERS:
            known = ", ".join((*_INTEGERS, *_NUMBERS))
            print(f"error: there is no option {name}; choose from {known}", file=sys.stderr)
            return
        try:
            kind = int if name in _INTEGERS else float
            value = None if word.lower() == "none" else kind(word)
            fields = asdict(SamplingOptions()).keys()
            SamplingOptions(
                **{key: item for key, item in self._options.items() if key in fields}
                | {name: value}
            )
        except Error as error:
            print(f"error: {error}", file=sys.stderr)
        except ValueError:
            kind_name = "a whole number" if name in _INTEGERS else "a number"
            print(f"error: {name} takes {kind_name} or none, not {word!r}", file=sys.stderr)
        else:
            self._options[name] = value


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
