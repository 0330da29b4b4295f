"""Lines that may be lost without harm to the work they report on."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def say(text: str) -> None:
    """Print a line at once. A reader that has gone, or a full disk, silences the lines after it."""
    try:
        print(text, flush=True)
    except OSError:
        # What is still buffered would fail again when Python ends.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(text: str) -> None:
    """Print a line about the work on standard error."""
    complain(f"note: {text}")


def complain(text: str) -> None:
    """Print a line on standard error, unless the terminal has been closed."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
