"""The frame of every command: its streams, its failures and exit codes, and the list of commands.

Exit codes: 0, 1 for a failure, 2 for a mistake in the arguments, 130 after Ctrl-C.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from .._system.invocation import as_called
from .._system.output import complain, drop_output, shown
from ..errors import UTF8_LOCALE, Error, is_out_of_memory, why_not_written
from ..errors import shown as shown_value

Main = Callable[[Sequence[str] | None], int]

COMMANDS = {
    "generate": "continue a text",
    "prepare": "turn text into tokens for training",
    "train": "train, fine-tune, resume",
    "report": "compare runs, in one HTML file",
    "serve": "a model over HTTP, in OpenAI's protocol, with a page to try it",
    "evaluate": "perplexity of a text, and the tasks of GPT-2's paper",
    "tune": "search for good settings",
    "doctor": "which implementation of each op runs here, and why",
    "benchmark": "how fast it runs here, and how much of the memory's speed that is",
}
"""A summary of each; its `main` is here in NAME.py, and `python -m gpt2fast.NAME` in a door."""


class UsageError(Error):
    """A mistake in the arguments; the exit code is 2."""


def command(
    *, mistakes: tuple[type[Error], ...] = (), interrupted: str = ""
) -> Callable[[Main], Callable[..., int]]:
    """Decorator of a command's `main`, which turns what it raises into a line and an exit code.

    Standard streams that are closed become /dev/null, so that nothing that is opened later takes
    their place; characters that a stream cannot encode are escaped; a reader of the output that
    has gone is no failure; the library's messages are shown.

    Args:
        mistakes: further errors that are mistakes in the arguments.
        interrupted: said after Ctrl-C.
    """

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None) -> int:
            open_closed_streams()
            suit_streams()
            with shown():
                try:
                    return _delivered(_run(main, argv, mistakes, interrupted))
                except SystemExit as leaving:
                    raise SystemExit(_delivered(leaving.code)) from None

        return run

    return decorate


def fail(error: object, code: int = 1) -> int:
    """Report a failure in one line; returns the exit code."""
    complain("error: " + as_called(" ".join(str(error).split())))
    return code


def leave(code: int) -> NoReturn:
    """Exit; after Ctrl-C without Python's own end of the program.

    Where C code that runs Python (an import of torch) has passed the interrupt on, Python would
    kill the process by SIGINT there, although the interrupt has been handled.
    """
    if code == 130:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Turn running out of memory into an `Error` that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise Error(f"out of memory: {advice}") from error


_no_output = False


def _run(
    main: Main, argv: Sequence[str] | None, mistakes: tuple[type[Error], ...], interrupted: str
) -> int:
    try:
        try:
            return main(argv)
        except RuntimeError as error:
            if isinstance(error.__cause__, KeyboardInterrupt):  # within the definition of a class
                raise KeyboardInterrupt from None
            raise
    except KeyboardInterrupt:
        if interrupted or sys.stderr.isatty():
            complain(interrupted)  # the terminal shows ^C in the middle of the text
        return 130
    except UnicodeEncodeError as error:
        if reason := why_not_written(error.object):
            return fail(reason)
        if error.encoding == sys.getfilesystemencoding():
            # The name comes out of a file; those of the command line are bytes that are known.
            return fail(
                f"the locale's {error.encoding} has no way to name the file "
                f"{shown_value(error.object)}: {UTF8_LOCALE}"
            )
        raise
    except Error as error:
        return fail(error, 2 if isinstance(error, (UsageError, *mistakes)) else 1)
    except BrokenPipeError:
        drop_output()  # whoever read it has enough
        return 0
    except OSError as error:
        drop_output()
        return fail(f"reading or writing failed: {error}")


def output_is_closed() -> bool:
    """True if the command was started with its standard output closed."""
    return _no_output


def open_closed_streams() -> None:
    """Put /dev/null in the place of standard streams that were closed (<&-, >&-, 2>&-)."""
    global _no_output
    _no_output = sys.stdout is None
    # In this order: an opened file takes the lowest number that is free.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def suit_streams() -> None:
    """Let the standard streams take every text: what they cannot encode is escaped.

    What the locale "C" calls ASCII is UTF-8 nearly everywhere, as Python itself assumes unless it
    is told not to.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # a replaced stream may lack it
            unknown = stream.encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968", "646")
            if unknown and not os.environ.get("PYTHONIOENCODING"):
                stream.reconfigure(encoding="utf-8", errors="strict")  # type: ignore[union-attr]
            if stream is not sys.stdin:
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _delivered(code: Any) -> Any:
    """Write what is left of the output; the exit code, which is 1 if that fails."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
    except OSError as error:
        drop_output()
        complain(f"error: writing failed: {error}")
        return code or 1
    except ValueError:  # it has been closed meanwhile
        pass
    return code
