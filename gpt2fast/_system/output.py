"""Lines of output: shown by a command, logged by the library elsewhere.

A program that imports gpt2fast decides itself what is printed: messages go to the loggers called
"gpt2fast.…" there, and nowhere else. Within `shown()`, in which every command runs, they are lines
on the terminal.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_LOGGER = logging.getLogger("gpt2fast")
_EVERY = 10.0
"""Seconds between the lines of a `StatusLine` that cannot be written over."""

_shown = 0
_held: list[str] | None = None
_status: StatusLine | None = None


@contextmanager
def shown() -> Iterator[None]:
    """Print the library's messages, instead of only logging them."""
    global _shown
    handler, level = _Handler(), _LOGGER.level
    outermost = _shown == 0
    if outermost:
        _LOGGER.addHandler(handler)
        if not _LOGGER.isEnabledFor(logging.INFO):
            _LOGGER.setLevel(logging.INFO)
    _shown += 1
    try:
        yield
    finally:
        _shown -= 1
        if outermost:
            _LOGGER.removeHandler(handler)
            _LOGGER.setLevel(level)


def is_shown() -> bool:
    """True within `shown()`, where messages are printed."""
    return _shown > 0


def say(text: str) -> None:
    """Print a line at once. A reader that has gone, or a full disk, silences the lines after it."""
    try:
        print(text, flush=True)
    except OSError:
        drop_output()


def deliver(text: str) -> None:
    """Print a line of a command's result at once. A reader may leave, as after `| head`.

    Raises:
        OSError: it cannot be written.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop_output()


def takes_unicode() -> bool:
    """True if standard output encodes every character. Others are escaped there, which would break
    JSON."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")


def drop_output() -> None:
    """Send standard output nowhere: what is still buffered would fail again when Python ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(log: logging.Logger, text: str) -> None:
    """A line about the work: said by a command, elsewhere logged (INFO)."""
    if is_shown():
        say(text)
    else:
        log.info("%s", text)


def warn(log: logging.Logger, text: str) -> None:
    """Something to know about the work: noted by a command, elsewhere logged (WARNING)."""
    if is_shown():
        note(text)
    else:
        log.warning("%s", text)


def note(text: str) -> None:
    """Print a line about the work on standard error."""
    complain(f"note: {text}")


def complain(text: str) -> None:
    """Print a line on standard error, unless the terminal has been closed."""
    if _held is not None:
        _held.append(text)
        return
    if _status is not None:
        _status.clear()
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def held() -> Iterator[None]:
    """Keep lines for standard error back while a text is streamed, so that none lands inside it.

    Where the text breaks off, as by Ctrl-C, its line on a terminal is ended first.
    """
    global _held
    before, _held = _held, []
    cut = True
    try:
        yield
        cut = False
    finally:
        lines, _held = _held, before
        if lines and cut and sys.stderr is not None and sys.stderr.isatty():
            complain("")
        for line in lines:
            complain(line)


class StatusLine:
    """One line of progress on standard error.

    On a terminal it is written over, ten times a second at most. Elsewhere it is a line every
    ten seconds, or nothing.

    Args:
        elsewhere: write where there is no terminal, too.
    """

    def __init__(self, elsewhere: bool = False) -> None:
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._every = 0.1 if self._terminal else _EVERY if elsewhere else float("inf")
        self._next = time.monotonic() + (0 if self._terminal else self._every)
        self._visible = False

    @property
    def is_due(self) -> bool:
        """True if `show` would write now."""
        return time.monotonic() >= self._next

    def show(self, text: str) -> None:
        """Show this, if it is time to."""
        if self.is_due:
            self._next = time.monotonic() + self._every
            self._write(text)

    def end(self, text: str) -> None:
        """Show this last, whenever it comes, unless nothing is ever shown."""
        if self._every < float("inf"):
            self.clear()
            complain(text)

    def clear(self) -> None:
        """Remove the line from the terminal."""
        global _status
        if self._visible:
            self._visible, _status = False, None
            with suppress(OSError, ValueError):
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()

    def _write(self, text: str) -> None:
        global _status
        if not self._terminal:
            complain(text)
            return
        self._visible, _status = True, self
        with suppress(OSError, ValueError):
            fitting = text[: shutil.get_terminal_size().columns - 1]  # two lines cannot be removed
            sys.stderr.write(f"\r\x1b[K{fitting}")
            sys.stderr.flush()


def clock(seconds: float) -> str:
    """75 as 1:15, a day and a half as 36:00:00."""
    minutes, left = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class _Handler(logging.Handler):
    """Prints what the library logs."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            complain(f"gpt2fast: {record.getMessage()}")
        except Exception:
            self.handleError(record)
