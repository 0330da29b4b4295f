"""The kept inputs of the fuzzers, and whether the fuzzers find what is there to be found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from time_limits import patience

FUZZ = Path(__file__).parent / "fuzz"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FUZZ.parents[1]), str(FUZZ)])}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=patience(),
    )


def test_every_kept_input_is_read_or_refused():
    names = [path.name for path in (FUZZ / "corpus").iterdir()]
    assert len(names) >= 13
    done = run(str(FUZZ / "run.py"), *names, "--one", "--engine", "chance", "--seconds", "0")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert done.stdout.count(" 0 findings") == len(names)


PLANTED = """
import pathlib, sys, tempfile
import run, targets
from gpt2fast.errors import Error

def wrong(data, folder):
    if b"9" * 40 in data:
        raise KeyError("a long number")
    raise Error("refused")

def slow(data, folder):
    while b"null" in data:
        pass

def large(data, folder):
    bytearray(2 * run.BYTES)

def rude(data, folder):
    raise Error("x" * 3000 + "y" * 3000 if b"true" in data else "fine")

run.SECONDS, run.FOUND = 1, pathlib.Path(tempfile.mkdtemp())
found = []
for planted, seconds in ((wrong, 20), (slow, 0), (large, 0), (rude, 0)):
    targets.TARGETS["config"] = planted
    found.append(run.by_chance("config", seconds, 0, most_findings=1))
kept = sorted(path for path in (run.FOUND / "config").iterdir())
assert any(b"9" * 40 in path.read_bytes() for path in kept)
print(found)
"""


@pytest.mark.slow
def test_planted_mistakes_are_found():
    done = run("-c", PLANTED)
    assert done.stdout.splitlines()[-1] == "[1, 1, 1, 0]", done.stdout + done.stderr
    for told in ("KeyError: 'a long number'", "TooLong: more than 1 s", "MemoryError"):
        assert told in done.stderr
