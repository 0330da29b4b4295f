"""One process at a time in a folder, and nothing left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2fast._system.lock import only_process
from gpt2fast.errors import Error

HOLD = """
import sys, time
from pathlib import Path
from gpt2fast._system.lock import only_process
with only_process(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
BUSY = Error("another process is at work here")


def test_a_lock_goes_with_the_process_that_holds_it(tmp_path: Path):
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(Error, match="another process is at work here"), only_process(path, BUSY):
        pass
    holder.kill()
    holder.communicate()
    with only_process(path), pytest.raises(Error, match="at work"), only_process(path, BUSY):
        pass
    assert not path.exists()


def test_a_link_is_not_followed(tmp_path: Path):
    target = tmp_path / "target"
    target.write_text("kept")
    (tmp_path / ".lock").symlink_to(target)
    with pytest.raises(OSError), only_process(tmp_path / ".lock", BUSY):
        pass
    assert target.read_text() == "kept"


@pytest.mark.parametrize("reason", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_a_file_system_without_locks_keeps_nothing_out(tmp_path: Path, monkeypatch, reason: str):
    def flock(descriptor: int, operation: int) -> None:
        code = getattr(errno, reason)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    with only_process(tmp_path / ".lock", BUSY), only_process(tmp_path / ".lock", BUSY):
        pass
    assert not any(tmp_path.iterdir())
