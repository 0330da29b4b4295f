"""What every command does around its work, whatever its streams and the locale are."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from .._system.output import complain, drop_output, shown
from ..errors import UTF8_LOCALE, why_not_written
from ..errors import shown as shown_value

Main = Callable[[Sequence[str] | None], int]


def command(main: Main) -> Callable[..., int]:
    """Decorator of a command line's `main`.

    Standard streams that are closed become /dev/null, so that nothing that is opened later takes
    their place; characters that a stream cannot encode are escaped; a reader of the output that
    has gone is no failure; the library's messages are shown.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        open_closed_streams()
        suit_streams()
        with shown():
            try:
                return _delivered(_run(main, argv))
            except SystemExit as leaving:
                raise SystemExit(_delivered(leaving.code)) from None

    return run


_no_output = False


def _run(main: Main, argv: Sequence[str] | None) -> int:
    try:
        return main(argv)
    except UnicodeEncodeError as error:
        if reason := why_not_written(error.object):
            complain(f"error: {reason}")
        elif error.encoding == sys.getfilesystemencoding():
            # The name comes out of a file; those of the command line are bytes that are known.
            complain(
                f"error: the locale's {error.encoding} has no way to name the file "
                f"{shown_value(error.object)}: {UTF8_LOCALE}"
            )
        else:
            raise
        return 1
    except OSError as error:
        drop_output()
        complain(f"error: {error}")
        return 1


def output_is_closed() -> bool:
    """Whether the command began without a standard output."""
    return _no_output


def open_closed_streams() -> None:
    """Put /dev/null in the place of standard streams that were closed (<&-, >&-, 2>&-)."""
    global _no_output
    _no_output = sys.stdout is None
    # In this order: an opened file takes the lowest number that is free.
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


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
