"""The display of a run: a panel on a terminal, lines when piped."""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2fast._system.output import shown
from gpt2fast.cli.command import suit_streams
from gpt2fast.training.logs import progress
from time_limits import patience

ROOT = Path(__file__).parents[1]


def make_row(step: int, **more: Any) -> dict[str, Any]:
    row = {"step": step, "tokens": 64 * step, "train_loss": 3 - step / 100, "lr": 1e-3}
    return {**row, "grad_norm": 1.0, "tokens_per_second": 500.0, "elapsed_seconds": 2.0, **more}


def test_sparkline():
    assert progress.sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert progress.sparkline([8, 8, 1, 1], 2) == "█▁"
    assert progress.sparkline([2.0, math.nan, math.inf, 2.0], 10) == "▁▁"
    assert progress.sparkline([], 10) == progress.sparkline([1.0], 0) == ""


def panel_lines(panel: Any, width: int) -> list[str]:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    return [
        "".join(segment.text for segment in line).rstrip()
        for line in console.render_lines(panel, pad=False)
    ]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that the display reads from time.perf_counter."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def running_panel(clock: list[float], **options: Any) -> Any:
    panel = progress._Panel(
        **{"steps": 1000, "done": 0, "elapsed": 0, "max_hours": None, **options}
    )
    for step in range(1, 101):
        clock[0] += 2
        panel.advance(step, 5 - step / 50, 1234.0)
    panel.row = {**panel.row, "val_loss": 3.25, "lr": 1e-3, "mfu": 0.41, "memory_gib": 2.5}
    return panel


def test_the_panel_says_everything_on_a_wide_terminal(clock):
    first, second = panel_lines(running_panel(clock), 110)
    assert first.startswith("step 100/1000") and "━" in first
    assert first.endswith("3:20, 30:00 left")  # 900 steps of 2 s
    assert second.startswith("loss 3.0000 █") and "▁" in second
    for part in ("val 3.2500", "1,234 tok/s", "lr 1.00e-03", "41% of peak", "2.5 GiB"):
        assert part in second


@pytest.mark.parametrize("width", [1, 7, 20, 33, 50, 79])
def test_the_panel_fits_every_width(clock, width):
    lines = panel_lines(running_panel(clock), width)
    assert len(lines) == 2 and all(len(line) <= width for line in lines)
    assert "step 100/1000".startswith(lines[0][:13]) and "loss 3.0000".startswith(lines[1][:11])


def test_the_panel_counts_time_where_that_ends_the_run(clock):
    # An hour less 1,800 s are left, and 2 s for each of 900 steps, or of 9,900.
    longer = running_panel(clock, steps=10_000, elapsed=1600.0, max_hours=1.0)
    first, _ = panel_lines(longer, 100)
    assert first.startswith("step 100/10000") and first.endswith("30:00, 30:00 left")
    room = 100 - len("step 100/10000") - len("30:00, 30:00 left") - 2
    assert abs(first.count("━") - room / 2) <= 1
    enough = running_panel(clock, elapsed=600.0, max_hours=1.0)
    first, _ = panel_lines(enough, 100)
    assert first.endswith("13:20, 30:00 left") and first.count("━") < room / 4


def test_the_panel_before_the_first_step_and_without_unicode(clock):
    empty = progress._Panel(10, 0, 0.0, None)
    assert panel_lines(empty, 60)[0].endswith("0:00, ? left")
    line = running_panel(clock)._second_line(80, ascii_only=True)
    assert line.isascii() and line.startswith("loss 3.0000  val")


@pytest.mark.parametrize("command", [True, False])
def test_output_is_plain_lines_when_piped_and_in_a_log(capsys, caplog, command):
    with shown() if command else caplog.at_level(logging.INFO, "gpt2fast"):
        display = progress.open_display(100, 0)
        display.message("data: [bold]x[/bold]")
        display.step(1, 3.0, 100.0)
        display.row(make_row(10, val_loss=2.5, val_loss_per_char=None, mfu=0.375))
        display.row({"step": 20, "tokens": 5, "val_loss": 2.0, "val_loss_per_char": 1.0})
        display.close()
    printed = capsys.readouterr()
    assert printed.err == ""
    assert bool(printed.out) == command != bool(caplog.messages)
    assert printed.out.splitlines() + caplog.messages == [
        "data: [bold]x[/bold]",
        "step  10/100  loss 2.9000  val 2.5000  lr 1.00e-03  grad 1.00  500 tok/s  38% of peak",
        "step  20/100  val 2.0000 (1.0000 per character)",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_sample_that_the_terminal_cannot_show_does_not_end_the_run(monkeypatch, terminal):
    written = io.BytesIO()
    stdout = io.TextIOWrapper(written, encoding="latin-1")
    monkeypatch.setattr(stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("TERM", "xterm")
    suit_streams()
    with shown():
        display = progress.open_display(10, 0)
        display.message("sea Ω \x1b[2J\n\tstorm")
        display.close()
    stdout.flush()
    assert b"sea \\u03a9 " in written.getvalue() and b"storm" in written.getvalue()
    assert (b"\x1b[2J" in written.getvalue()) == (not terminal)


ON_A_TERMINAL = """
import sys, time
from gpt2fast._system.output import shown
from gpt2fast.training.logs.progress import open_display
with shown():
    display = open_display(40, 0)
try:
    display.message("begin [1/2]")
    print("a line from elsewhere")
    for step in range(1, 41):
        time.sleep(0.03)
        display.step(step, 5 - step / 10, 100.0)
        if step % 20 == 0:
            row = {"lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 100.0}
            row |= {"train_loss": 3.0, "val_loss": 2.5, "val_loss_per_char": None}
            display.row({"step": step, **row})
finally:
    display.close()
print("closed")
"""


def on_a_terminal(code: str, act: Any = lambda process, terminal: None) -> tuple[int, str]:
    """Run Python in a terminal of 60 columns; its exit code and all that it wrote there."""
    pty, termios, fcntl = (pytest.importorskip(name) for name in ("pty", "termios", "fcntl"))
    import struct

    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=side, stdout=side, stderr=side, cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(side)
    written = b""
    acted = False
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # the other side was closed
            break
        if not piece:
            break
        written += piece
        if not acted and b"tok/s" in written:
            acted = True
            act(process, terminal)
    os.close(terminal)
    return process.wait(patience()), written.decode(errors="replace")


def test_a_terminal_shows_a_live_panel_and_keeps_validations():
    def resize(process: Any, terminal: int) -> None:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 30, 0, 0))

    code, shown = on_a_terminal(ON_A_TERMINAL, resize)
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    for part in ("begin [1/2]", "a line from elsewhere", "step 40/40", "loss 1.0000", "closed"):
        assert part in plain
    assert plain.count("step 20/40  loss 3.0000  val 2.5000") == 1
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0  # the cursor is back


def test_ctrl_c_gives_the_terminal_back():
    code, shown = on_a_terminal(
        ON_A_TERMINAL, lambda process, terminal: os.write(terminal, b"\x03")
    )
    assert "KeyboardInterrupt" in shown and "closed" not in shown and code != 0
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0


def test_a_terminal_that_is_gone_does_not_end_the_run(monkeypatch, capsys):
    class Gone:
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

        def flush(self) -> None:
            self.write("")

    monkeypatch.setattr(sys, "stdout", Gone())
    with shown():
        display = progress.open_display(3, 0)
    display.message("hello")
    display.step(1, 3.0, 1.0)
    display.row(make_row(1, val_loss=2.0, val_loss_per_char=None))
    display.close()
