"""Pages of documentation as their readers use them: fenced blocks, and running what is in them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpt2fast.__main__ import main as gpt2fast_command
from gpt2fast.cli.command import COMMANDS
from time_limits import patience

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"line{self.line}-{self.language}"

    @property
    def commands(self) -> list[str]:
        """The lines of a block of shell commands."""
        return [line for line in self.text.splitlines() if line.strip()]

    def execute(self, replaced: Mapping[str, str] | None = None) -> None:
        """Run a block of Python, with some of its text replaced."""
        code = "\n" * self.line + self.text
        for written, instead in (replaced or {}).items():
            code = code.replace(written, instead)
        exec(compile(code, str(self.page), "exec"), {"__name__": "__main__"})


def fences(page: Path) -> list[Fence]:
    """The fenced blocks of a page; all are closed and none is indented."""
    text = page.read_text(encoding="utf-8")
    found = [
        Fence(page, text.count("\n", 0, block.start()) + 1, block[1], block[2])
        for block in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]
    assert text.count("```") == 2 * len(found), f"{page.name}: a fence is not closed, or indented"
    return found


def run(line: str, added: Mapping[str, str] | None = None) -> str:
    """Run one command line; returns its standard output.

    Args:
        line: `gpt2fast ...` runs in this process, all else in a shell.
        added: flags that a command gets at its end, by its beginning (without `gpt2fast`).
    """
    words = shlex.split(line)
    if words[0] == "gpt2fast":
        added = added or {}
        start = max((start for start in added if line[9:].startswith(start)), key=len, default="")
        words += shlex.split(added.get(start, ""))
        if not {"|", ">", "<", "&&"} & set(words):
            return in_this_process(words[1:])
    return in_a_shell(line)


def in_this_process(arguments: list[str]) -> str:
    """`gpt2fast arguments`, without the seconds that importing torch again takes."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        code = gpt2fast_command(arguments)
    assert code == 0, f"gpt2fast {shlex.join(arguments)} ended with {code}"
    return written.getvalue()


def in_a_shell(line: str) -> str:
    """One command line, in a shell."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    # `python` is this one, and it finds this tree.
    commands = "|".join(COMMANDS)
    line = re.sub(rf"(?<![\w/.])gpt2fast (?=({commands})\b)", "python -m gpt2fast ", line)
    line = re.sub(r"\bpython\b", shlex.quote(sys.executable), line)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [bash, "-euo", "pipefail", "-c", line],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=patience(),
    )
    assert done.returncode == 0, f"{line} ended with {done.returncode}"
    return done.stdout
