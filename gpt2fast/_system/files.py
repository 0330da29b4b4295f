"""Files, written atomically, so that a reader sees the old content or the new, never a part; and
read only if they are regular files, since a pipe or a device could block forever."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; rename it over `path` if the block succeeds.

    Args:
        path: the file to create or replace.
        mode: "wb" (bytes) or "w" (UTF-8 text). Lone surrogates, which stand for bytes in the names
            of files, are escaped as JSON and YAML do it.

    The data are flushed to the disk before the rename. If the block raises, the temporary file
    is removed and `path` is left as it was.
    """
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
        with open(descriptor, mode, **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(target.parent)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the content of `path` by `text` (UTF-8) atomically."""
    with atomic_write(path, "w") as file:
        file.write(text)


@contextmanager
def new_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a temporary folder beside `path`; it gets that name if the block succeeds.

    Args:
        path: the folder to create, with its parents; it may exist, if it is empty.

    Raises:
        OSError: nothing can be written there, or `path` is no empty folder by then. The temporary
            folder is removed, as it is if the block raises.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        sync_directory(temporary)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(target.parent)


def remove_unfinished(directory: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Remove the temporary files of killed processes that were writing files called `names`."""
    for name in names:
        for path in Path(directory).glob(f".{name}.????????"):
            path.unlink(missing_ok=True)


def open_file(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file for reading, without waiting for anything.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe, a device or a socket.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, f"it is {_kind(mode)}, not a file", os.fspath(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: str | os.PathLike[str], largest: int) -> bytes:
    """The content of a regular file of at most `largest` bytes.

    Raises:
        OSError: as of `open_file`, and where the file is larger.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        # Not largest + 1 at once: that much memory is set aside before anything is read.
        content = file.read(size + 1) if size <= largest else b""
        if len(content) > size:  # it has grown, or is none that has a size
            content += file.read(largest + 1 - len(content))
            size = len(content)
    if size > largest:
        reason = f"it has {size} bytes or more; {largest} are the most that are read of such a file"
        raise OSError(errno.EFBIG, reason, os.fspath(path))
    return content


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make the renames and creations in a directory durable, where the system allows it."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    # The process's umask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
