"""One process at a time in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import Error


@contextmanager
def only_process(path: Path, busy: Error) -> Iterator[None]:
    """Hold the lock file `path`; raises `busy` if another process does. It goes with the lock.

    Where the system or the file system has no such locks (Windows), nothing is kept out.
    """
    with open(path, "a") as file:
        try:
            import fcntl
        except ImportError:
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:
            pass
        if not _is_still(path, file.fileno()):  # its last holder removed it after it was opened
            raise busy
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False
