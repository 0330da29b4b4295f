"""csrc → one shared library, by the C++ compiler that is here.

`setup.py` calls this when a package is built, `library.py` when kernels are first used: the same
sources and flags either way. torch is not imported, since it cannot be while pip builds; only its
headers are looked for. `torch.utils.cpp_extension.load` would want ninja and setuptools here, link
libtorch_python, and leave its lock behind when it is killed.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import BackendError

FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread"),
    # The oldest torch that the library is to load in: 2.10.
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)
"""For every source alike; files that want an instruction set switch it on themselves."""

if sys.platform == "darwin":
    _LINK_FLAGS = ("-shared", "-pthread", "-ltorch", "-ltorch_cpu")
else:
    # libtorch.so holds no symbol of ours, and brings the libraries with it that do.
    _LINK_FLAGS = (
        *("-shared", "-pthread"),
        *("-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"),
    )


class CompilerError(BackendError):
    """The compiler ran and failed; `output` is what it said."""

    def __init__(self, message: str, output: str):
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Toolchain:
    """What a build needs besides the sources."""

    compiler: tuple[str, ...]
    """The compiler and the flags that came with its name in CXX."""
    torch: Path
    """The installed torch's folder, with include and lib in it."""


def find_toolchain() -> Toolchain:
    """The compiler and torch's headers; raises `BackendError` saying which is missing."""
    return Toolchain(find_compiler(), _find_torch())


def find_compiler() -> tuple[str, ...]:
    """The command of a C++ compiler: CXX, or the first of c++, g++, clang++."""
    if sys.platform == "win32":
        raise BackendError("nobody has tried to compile the kernels on Windows")
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path is not None:
            return (path, *command[1:])
    missing = f"CXX={named[0]} is not found" if named else "there is no C++ compiler"
    raise BackendError(f"{missing}; install g++ (apt install g++), or name another one in CXX")


def _find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    # The interpreter's own, which pip hides from the builds that it isolates.
    folders += [os.path.join(sysconfig.get_path(kind), "torch") for kind in ("platlib", "purelib")]
    for folder in folders:
        if Path(folder, "include/torch/csrc/stable/library.h").is_file():
            return Path(folder)
    raise BackendError(
        "torch's C++ headers are not here (PyPI's torch 2.10 or later brings them along)"
    )


def source_folder() -> Path:
    """csrc: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "binding").is_dir():
            return folder
    raise BackendError(f"the kernels' source is not here: no csrc in {package}, nor beside it")


def source_files(folder: Path) -> list[Path]:
    """Everything that the library is made of, headers included, in a fixed order."""
    tree = [path for part in ("binding", "cpu") for path in (folder / part).rglob("*")]
    return sorted(path for path in tree if path.suffix in (".cpp", ".h"))


def extra_flags() -> list[str]:
    """What the environment adds, and may change: CXXFLAGS."""
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def processors() -> int:
    """How many compilers run at once."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compile_library(target: Path, toolchain: Toolchain) -> None:
    """Compile csrc into the shared library `target`, which appears whole or not at all.

    Raises:
        CompilerError: with the compiler's output.
    """
    folder = source_folder()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.stem}-") as scratch:
        commands, objects = [], []
        # What takes longest comes first.
        units = [path for path in source_files(folder) if path.suffix == ".cpp"]
        units.sort(key=lambda path: (path.parent.name != "isa", path.parent.name != "binding"))
        for unit in units:
            objects.append(os.path.join(scratch, f"{unit.parent.name}-{unit.stem}.o"))
            include = ["-isystem", str(toolchain.torch / "include"), f"-I{folder}"]
            commands.append(
                [*toolchain.compiler, *FLAGS, *extra_flags()]
                + (include if unit.parent.name == "binding" else [])
                + ["-c", str(unit), "-o", objects[-1]]
            )
        _run_all(commands, processors())
        linked = os.path.join(scratch, target.name)
        libraries = ["-L" + str(toolchain.torch / "lib"), *_LINK_FLAGS]
        linking = [*toolchain.compiler, *extra_flags(), *objects, "-o", linked, *libraries]
        _run_all([linking], 1)
        os.replace(linked, target)


def _run_all(commands: Sequence[Sequence[str]], at_once: int) -> None:
    """Run commands, a few at once; when one fails, or we are interrupted, the others are ended."""
    waiting = list(commands)
    running: list[tuple[Sequence[str], subprocess.Popen[bytes]]] = []
    with tempfile.TemporaryFile() as output:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    command = waiting.pop(0)
                    running.append((command, _start(command, output.fileno())))
                for command, process in list(running):
                    code = process.poll()
                    if code is None:
                        continue
                    running.remove((command, process))
                    if code != 0:
                        output.seek(0)
                        said = output.read().decode("utf-8", "replace")
                        raise CompilerError(
                            f"{command[0]} failed: {_first_error(said, code)}",
                            f"{shlex.join(command)}\n{said}\nexit code {code}\n",
                        )
                time.sleep(0.02)
        finally:
            for _, process in running:
                _end(process)


def _start(command: Sequence[str], output: int) -> subprocess.Popen[bytes]:
    try:
        # A session of its own: a compiler runs others, and they are to end with it.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        raise CompilerError(f"{command[0]} does not run: {error.strerror}", str(error)) from None


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:  # it has just ended
        process.kill()
    process.wait()


def _first_error(output: str, code: int) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return f"{(errors or lines or [f'exit code {code}'])[0]:.200}"
