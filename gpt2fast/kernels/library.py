"""Finds the compiled kernels: named by the user, installed with the package, or built here.

    GPT2FAST_NATIVE=0              no compiled kernels
    GPT2FAST_LIBRARY=FILE          this library of CPU kernels and no other
    GPT2FAST_CUDA_LIBRARY=FILE     this library of CUDA kernels and no other
    GPT2FAST_CUDA_ARCHS="80;90a"   the GPUs to compile for, instead of those that are here
    GPT2FAST_CACHE=FOLDER          where what is built at first use is kept (~/.cache/gpt2fast)

A build is kept under the hash of the sources, the flags and the compiler. Neither torch's version
nor Python's is part of it: the libraries use torch's stable ABI and nothing of Python.

What is in the cache is loaded only where nobody else can have put it there: the folder and the file
are opened once, without following links, and what was opened is what is looked at and loaded.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import multiprocessing
import os
import platform
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .._system.files import atomic_write_text
from .._system.lock import only_process
from ..errors import BackendError
from .toolchain import (
    CPU,
    FLAGS,
    NVCC_FLAGS,
    SIMULATED_FLAGS,
    CompilerError,
    Part,
    Toolchain,
    compile_library,
    cuda_architectures,
    extra_flags,
    find_compiler,
    find_cublas,
    find_cuda,
    find_toolchain,
    processors,
    source_files,
    source_folder,
)

_log = logging.getLogger(__name__)

INSTALLED = "installed with the package"
BUILT = "built at first use"

# After this time a build that failed is tried again: something else may have been installed.
_RETRY = 3600
_AGAIN = "The kernels are compiled again when this file is removed or an hour old."
_KEPT = 8


@dataclass(frozen=True)
class Library:
    """A shared library with the kernels."""

    path: Path
    origin: str
    """Its origin in words, such as "installed with the package"."""


def file_name(part: Part) -> str:
    """The name of a part's library in the installed package."""
    return f"libgpt2fast_{part.name}.so"


def find_library(part: Part = CPU, architectures: Sequence[str] = ()) -> Library:
    """The library of these sources, built now if necessary.

    Args:
        part: of csrc.
        architectures: of the GPUs here, for the CUDA part.

    Raises:
        BackendError: there is none, and why.
    """
    if is_switched_off():
        raise BackendError("switched off by GPT2FAST_NATIVE")
    variable = "GPT2FAST_LIBRARY" if part is CPU else f"GPT2FAST_{part.name.upper()}_LIBRARY"
    named = os.environ.get(variable)
    if named:
        if not os.path.isfile(named):
            raise BackendError(f"{variable}={named} is not a file")
        return Library(Path(named).absolute(), f"named by {variable}")
    installed = Path(__file__).resolve().parents[1] / file_name(part)
    if installed.is_file():
        return Library(installed, INSTALLED)
    return build_library(part, architectures)


def is_switched_off() -> bool:
    """True if the user asked for no compiled kernels; nobody needs a warning then."""
    return os.environ.get("GPT2FAST_NATIVE", "").lower() in ("0", "off", "no", "false")


def notice(text: str, level: int = logging.WARNING) -> None:
    """Log a line, in the main one of the processes that would all say it."""
    if multiprocessing.parent_process() is None and os.environ.get("LOCAL_RANK", "0") == "0":
        _log.log(level, "%s", text)


def build_library(part: Part = CPU, architectures: Sequence[str] = ()) -> Library:
    """The library in the cache, built now if it is not there; arguments as of `find_library`.

    Raises:
        BackendError: it cannot be built, and why.
    """
    sources = _source_key(part, architectures)
    stem = f"gpt2fast_{part.name}"
    try:
        name = f"{stem}-{sources}-{_compiler_key(find_compiler())}.so"
    except BackendError:
        # Without a compiler, take a build of these sources by any compiler.
        name = f"{stem}-{sources}-*.so"
    for folder in _cache_folders():
        if _why_not_ours(folder):
            continue
        for path in sorted(folder.glob(name)):
            try:
                os.close(_opened(path))
                return Library(path, BUILT)
            except OSError:
                with suppress(OSError):
                    path.unlink()
    toolchain = find_toolchain(part, architectures)
    folder = _writable_folder()
    return Library(_build(folder / name, toolchain, part), BUILT)


def opened(library: Library) -> int | None:
    """A descriptor of a library in the cache, to be loaded; None for one that is trusted by name.

    Raises:
        OSError: it is not what was found there, or cut short.
    """
    if library.origin == BUILT and os.path.isdir("/proc/self/fd"):
        return _opened(library.path)
    descriptor = os.open(library.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        _require_whole(descriptor, library.path)
    finally:
        os.close(descriptor)
    return None


def _opened(path: Path) -> int:
    """A descriptor of a library in the cache, which nobody but us (and root) can have written.

    Raises:
        OSError: somebody else can, or it is cut short.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    if os.open in os.supports_dir_fd:
        folder = _opened_folder(path.parent)
        try:
            owner = os.fstat(folder).st_uid
            descriptor = os.open(path.name, flags | os.O_NONBLOCK, dir_fd=folder)
        finally:
            os.close(folder)
    else:
        owner = _user()
        descriptor = os.open(path, flags)
    try:
        found = os.fstat(descriptor)
        trusted = {_user(), 0, owner} if os.environ.get("GPT2FAST_CACHE") else {_user(), 0}
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EPERM, "it is not a file", str(path))
        if os.name == "posix" and (found.st_uid not in trusted or found.st_mode & 0o022):
            raise OSError(errno.EPERM, "others can have written it", str(path))
        _require_whole(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _opened_folder(folder: Path) -> int:
    """A descriptor of a folder of the cache that is ours alone, or was named.

    Raises:
        OSError: it is not there, or others can put libraries there.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(folder, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and folder.is_symlink():
            raise OSError(errno.EPERM, "it is a link, not a folder", str(folder)) from None
        raise
    found = os.fstat(descriptor)
    if os.environ.get("GPT2FAST_CACHE"):
        # Its owner and group are the choice of whoever named it; in /tmp files are their owners'.
        bad = bool(found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX)
    else:
        bad = found.st_uid not in (_user(), 0) or bool(found.st_mode & 0o022)
    if bad:
        os.close(descriptor)
        raise OSError(errno.EPERM, "others can write there", str(folder))
    return descriptor


def _why_not_ours(folder: Path) -> str | None:
    """A reason not to trust libraries in `folder`, which somebody else could write; or None."""
    if os.open not in os.supports_dir_fd:
        return None
    try:
        os.close(_opened_folder(folder))
    except OSError as error:
        return error.strerror or str(error)
    return None


def _require_whole(descriptor: int, path: Path) -> None:
    """Raise OSError unless its end is there: one cut short kills the process that loads it."""
    if not _is_whole(os.pread(descriptor, 64, 0), os.fstat(descriptor).st_size):
        raise OSError(errno.EINVAL, "it is only the beginning of a library", str(path))


def _is_whole(head: bytes, size: int) -> bool:
    if head[:6] != b"\x7fELF\x02\x01" or len(head) < 64:  # 64 bits, little-endian
        return size > 0 and head[:4] != b"\x7fELF"
    (sections,) = struct.unpack_from("<Q", head, 0x28)  # the last thing in the file
    entry, count = struct.unpack_from("<HH", head, 0x3A)
    return sections + entry * count <= size


def _build(path: Path, toolchain: Toolchain, part: Part) -> Path:
    log = path.with_suffix(".log")
    busy = BackendError("another process is compiling the kernels")
    waited = False
    while True:
        try:
            with only_process(path.with_suffix(".lock"), busy):
                # Whoever held the lock before may have done it, or failed.
                if not path.is_file():
                    _complain_again(log)
                    _compile(path, toolchain, part, log)
                return path
        except BackendError as error:
            if error is not busy:
                raise
        if not waited:
            notice("another process is compiling the kernels; waiting for it", logging.INFO)
            waited = True
        time.sleep(0.1)


def _compile(path: Path, toolchain: Toolchain, part: Part, log: Path) -> None:
    seconds = max(10, 10 * round(part.work / min(processors(), 4) / 10))
    kernels = "its kernels" if part is CPU else f"its {part.name} kernels"
    notice(f"compiling {kernels} for this machine, once (about {seconds} s)", logging.INFO)
    for left in path.parent.glob(f".{path.stem}-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        compile_library(path, toolchain, part)
    except CompilerError as error:
        with suppress(OSError):
            atomic_write_text(log, f"{error}\n{_AGAIN}\n\n{error.output}")
        raise BackendError(_failure(error, log)) from None
        path.chmod(path.stat().st_mode & ~0o022)  # whatever the umask is
    except OSError as error:
        raise BackendError(f"compiling the kernels in {path.parent} failed: {error}") from None
    with suppress(OSError):
        log.unlink(missing_ok=True)
        _forget_old(path.parent, part)


def _complain_again(log: Path) -> None:
    """Raise what a recent build with the same sources and compiler failed of."""
    with suppress(OSError):
        if time.time() - log.stat().st_mtime < _RETRY:
            first = log.read_text(encoding="utf-8").partition("\n")[0]
            raise BackendError(_failure(first, log))


def _failure(error: object, log: Path) -> str:
    return f"compiling the kernels failed: {error}; the compiler's output is in {log}"


def _forget_old(folder: Path, part: Part) -> None:
    libraries = sorted(
        folder.glob(f"gpt2fast_{part.name}-*.so"),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    for path in libraries[_KEPT:]:
        path.unlink(missing_ok=True)


def _source_key(part: Part, architectures: Sequence[str]) -> str:
    """Hash of the sources, the flags and the kind of machine."""
    folder = source_folder()
    flags: list[object] = [FLAGS, extra_flags()]
    if part is not CPU:
        with suppress(BackendError):
            flags.append(os.path.realpath(find_cuda()))
            flags.append(find_cublas() is not None)
        flags += [NVCC_FLAGS, SIMULATED_FLAGS, cuda_architectures(architectures)]
    key = hashlib.sha256(repr([platform.system(), platform.machine(), *flags]).encode())
    for path in source_files(folder, part):
        content = path.read_bytes()
        key.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        key.update(content)
    return key.hexdigest()[:12]


def _compiler_key(command: tuple[str, ...]) -> str:
    """Hash of the compiler's path, size and date: asking its version would take longer."""
    path = os.path.realpath(command[0])
    found = os.stat(path)
    key = repr([path, command[1:], found.st_size, found.st_mtime_ns])
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def _cache_folders() -> Iterator[Path]:
    """Folders for builds, best first: the one that was named, or the user's and a temporary one."""
    named = os.environ.get("GPT2FAST_CACHE")
    if named:
        yield Path(os.path.realpath(named))
        return
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg and os.path.isabs(xdg):
        yield Path(os.path.realpath(os.path.join(xdg, "gpt2fast")))
    else:
        with suppress(RuntimeError):  # no HOME, and a user of whom the system knows none
            yield Path(os.path.realpath(Path.home() / ".cache" / "gpt2fast"))
    # A link of this name could be anybody's, and is not followed.
    yield Path(os.path.realpath(tempfile.gettempdir()), f"gpt2fast-{_user()}")


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def _writable_folder() -> Path:
    reasons = []
    for folder in _cache_folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if reason := _why_not_ours(folder):
                reasons.append(f"{folder}: {reason}")
                continue
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
            continue
        return folder
    raise BackendError(
        f"there is nowhere to keep compiled kernels ({'; '.join(reasons)}); "
        "name a folder of your own in GPT2FAST_CACHE"
    )
