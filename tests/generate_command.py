"""Helpers of the tests of `gpt2fast generate`: texts, processes, a terminal."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from time_limits import deadline

PROMPT = "Once upon a time"
TEXT = "Once upon a time the cat sat on the mat. The dog sat there too, and so it goes on. "


def assert_one_error(result, code, *parts):
    """One line on standard error, nothing on standard output."""
    assert result[0] == code
    assert result[1] == ""
    lines = result[2].splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def command(model_dir, *arguments):
    return [sys.executable, "-m", "gpt2fast.generate", "--model", str(model_dir), *arguments]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
ENDLESS = ["--max-new-tokens", "1000000", "--eos-token-id", "none", "--seed", "1"]


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, arguments):
        import pty

        self.screen = b""
        self._main, side = pty.openpty()
        self.process = subprocess.Popen(
            arguments, stdin=side, stdout=side, stderr=side, env=ENVIRONMENT, start_new_session=True
        )
        os.close(side)

    def wait_for(self, text):
        """Read until the text appears on the screen; returns all that came up to it."""
        end = deadline()
        while text not in self.screen:
            assert time.monotonic() < end, self.screen
            if select.select([self._main], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self._main, 4096)
                except OSError as error:  # Linux reports the end of a terminal so
                    assert error.errno == errno.EIO
                    assert text in self.screen
        before, _, self.screen = self.screen.partition(text)
        return before + text

    def wait_for_more(self, count):
        """Read until so many bytes have come; they stay on the screen."""
        end = deadline()
        while len(self.screen) < count:
            assert time.monotonic() < end, self.screen
            if select.select([self._main], [], [], 0.1)[0]:
                self.screen += os.read(self._main, 4096)

    def type(self, text):
        os.write(self._main, text)

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)
