"""One process at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import Error


@contextmanager
def only_process(path: Path, busy: Error | None = None) -> Iterator[None]:
    """Hold the lock file `path`, which is removed with the lock; where the file system has no
    locks, nothing is kept out.

    Args:
        path: of the lock file.
        busy: raised if another process holds it; None waits.

    Raises:
        OSError: the file cannot be opened; a link there is not followed.
    """
    from filelock import FileLock, Timeout  # not at the top: setup.py imports this without it

    lock = FileLock(path, timeout=-1 if busy is None else 0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise busy or error from None
    except OSError as error:
        if error.filename is not None:  # flock's own errors name no file
            raise
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()
