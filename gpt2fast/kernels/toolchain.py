"""csrc → shared libraries, by the compilers that are here: one for CPUs, one for GPUs.

`setup.py` calls this when a package is built, `library.py` when kernels are first used: the same
sources and flags either way. torch is not imported, since it cannot be while pip builds; only its
headers are looked for. `torch.utils.cpp_extension.load` would want ninja and setuptools here, link
libtorch_python, leave its lock behind when it is killed, and refuse CUDA beside a CPU build of
torch, where the GPU's library is to be compiled and loaded as well.
"""

from __future__ import annotations

import importlib.util
import os
import re
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

from ..errors import BackendError

# The oldest torch that a library is to load in: 2.10.
_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", _TORCH)
"""For every C++ source alike; files that want an instruction set switch it on themselves."""
NVCC_FLAGS = (
    *("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr"),
    # A kernel that keeps values in memory for want of registers has to be written differently.
    *("-Xptxas", "-warn-spills", "-Werror", "cross-execution-space-call"),
)
# Tests run every kernel some hundred times and wait for the compiler once: both count.
SIMULATED_FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread", _TORCH),
    "-DGPT2FAST_SIMULATED",
)
ARCHITECTURES = ("80", "90a")
"""Targets of the CUDA kernels; a GPU in between runs those of the lower number."""

if sys.platform == "darwin":
    _LINK_FLAGS = ("-shared", "-pthread", "-ltorch", "-ltorch_cpu")
else:
    # libtorch.so holds no symbol of ours, and brings the libraries with it that do.
    _LINK_FLAGS = (
        *("-shared", "-pthread"),
        *("-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu"),
    )


@dataclass(frozen=True)
class Part:
    """One of the shared libraries that csrc becomes."""

    name: str
    """Part of the library's file name."""
    folders: tuple[str, ...]
    """Folders of csrc that belong to it, headers included."""
    work: int
    """Seconds of one processor that it takes to compile, roughly."""


_SHARED = ("common", "binding/common")
CPU = Part("native", (*_SHARED, "binding/cpu", "cpu"), 90)
CUDA = Part("cuda", (*_SHARED, "binding/cuda", "launch", "kernels", "device"), 240)
SIMULATED = Part("simulated", CUDA.folders, 60)
"""The CUDA part on a CPU, for tests: its kernels run in the simulator, its ops take CPU tensors."""


class CompilerError(BackendError):
    """The compiler ran and failed; `output` is what it said."""

    def __init__(self, message: str, output: str):
        super().__init__(message)
        self.output = output


@dataclass(frozen=True)
class Toolchain:
    """The tools of a build: everything it needs besides the sources."""

    compiler: tuple[str, ...]
    """The compiler and the flags that came with its name in CXX."""
    torch: Path
    """The installed torch's folder, with include and lib in it."""
    cuda: Path | None = None
    """The CUDA toolkit's folder, with bin, include and lib64 in it."""
    architectures: tuple[str, ...] = ()
    """GPUs to compile for: "80" is compute capability 8.0."""
    cublas: Path | None = None
    """The folder of cublasLt.h; without one, what uses cuBLASLt is left out."""


def find_toolchain(part: Part = CPU, architectures: Sequence[str] = ()) -> Toolchain:
    """The compilers and torch's headers; raises `BackendError` saying which is missing.

    Args:
        part: the part of csrc to compile.
        architectures: of the GPUs to compile for; GPT2FAST_CUDA_ARCHS comes first, and with
            neither it is `ARCHITECTURES`.
    """
    compiler, torch = find_compiler(), _find_torch()
    if part is CPU:
        return Toolchain(compiler, torch)
    home = find_cuda()
    if part is CUDA and not (home / "bin" / "nvcc").is_file():
        raise BackendError(f"there is no nvcc in {home / 'bin'}; name a whole toolkit in CUDA_HOME")
    return Toolchain(compiler, torch, home, cuda_architectures(architectures), find_cublas())


def cuda_architectures(wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The architectures in GPT2FAST_CUDA_ARCHS ("80;90a"), else those wanted, else all."""
    named = os.environ.get("GPT2FAST_CUDA_ARCHS", "")
    chosen = tuple(named.replace(";", " ").replace(",", " ").split()) or tuple(wanted)
    for name in chosen:
        if not re.fullmatch(r"\d{2,3}[af]?", name) or int(name.rstrip("af")) < 80:
            raise BackendError(
                f"GPT2FAST_CUDA_ARCHS: {name!r} is no architecture that the kernels can be "
                'compiled for; they need 80 (Ampere) or more, written like "80;90a"'
            )
    return chosen or ARCHITECTURES


def find_cuda() -> Path:
    """The CUDA toolkit's folder: CUDA_HOME, CUDA_PATH, nvcc's own, or the usual place."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    found = [Path(named)] if named else []
    if nvcc is not None and not named:
        found.append(Path(nvcc).resolve().parent.parent)
    if not named:
        found.append(Path("/usr/local/cuda"))
    for folder in found:
        if (folder / "include" / "cuda_runtime.h").is_file():
            return folder
    missing = f"CUDA_HOME={named} has no include/cuda_runtime.h" if named else "nvcc is not found"
    raise BackendError(
        f"{missing}; install the CUDA toolkit 12.4 or later, or name it in CUDA_HOME"
    )


def find_cublas() -> Path | None:
    """The folder of cublasLt.h: of the package that PyPI's torch brings, or of the toolkit."""
    packages = _find_torch().parent / "nvidia"
    # One folder for all of CUDA 13, one for each library of CUDA 12.
    for folder in (packages / "cu13", packages / "cublas", find_cuda()):
        if (folder / "include" / "cublasLt.h").is_file():
            return folder / "include"
    return None


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
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "binding").is_dir():
            return folder
    raise BackendError(f"the kernels' source is not here: no csrc in {package}, nor beside it")


def source_files(folder: Path, *parts: Part) -> list[Path]:
    """Everything that the libraries are made of, headers included, in a fixed order."""
    folders = {name for part in parts or (CPU, CUDA) for name in part.folders}
    tree = [path for name in folders for path in (folder / name).rglob("*")]
    return sorted(path for path in tree if path.suffix in (".cpp", ".cu", ".cuh", ".h"))


def extra_flags() -> list[str]:
    """The flags in CXXFLAGS; they come last, so they override ours."""
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def processors() -> int:
    """The number of compilers to run at once."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def compile_library(target: Path, toolchain: Toolchain, part: Part = CPU) -> None:
    """Compile a part of csrc into the shared library `target`, which appears whole or not at all.

    Raises:
        CompilerError: with the compiler's output.
    """
    folder = source_folder()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.stem}-") as scratch:
        commands, objects = [], []
        units = [path for path in source_files(folder, part) if path.suffix in (".cpp", ".cu")]
        if toolchain.cublas is None:
            units = [path for path in units if path.stem != "cublaslt"]
        for unit in sorted(units, key=_takes_less_time):
            objects.append(os.path.join(scratch, f"{unit.parent.name}-{unit.stem}.o"))
            command = _compile_command(unit, folder, toolchain, part)
            commands.append([*command, "-c", str(unit), "-o", objects[-1]])
        _run_all(commands, processors())
        linked = os.path.join(scratch, target.name)
        libraries = ["-L" + str(toolchain.torch / "lib"), *_LINK_FLAGS]
        if part is CUDA:
            # Linked statically, the run-time library asks for no particular CUDA beside torch's.
            libraries += [f"-L{toolchain.cuda}/lib64", "-lcudart_static", "-ldl", "-lrt"]
        linking = [*toolchain.compiler, *extra_flags(), *objects, "-o", linked, *libraries]
        _run_all([linking], 1)
        os.replace(linked, target)


def _takes_less_time(unit: Path) -> tuple[bool, bool, str]:
    return unit.suffix != ".cu", unit.parent.name != "isa", unit.name


def _compile_command(unit: Path, folder: Path, toolchain: Toolchain, part: Part) -> list[str]:
    """The command that compiles `unit`, without the names of input and output."""
    if unit.suffix == ".cu" and part is CUDA:
        targets = [
            f"-gencode=arch=compute_{name},code=sm_{name}" for name in toolchain.architectures
        ]
        oldest = min(toolchain.architectures, key=lambda name: int(name.rstrip("af")))
        if oldest.isdigit():  # for GPUs newer than the compiler, which translate it themselves
            targets.append(f"-gencode=arch=compute_{oldest},code=compute_{oldest}")
        host = ["-ccbin", toolchain.compiler[0]] if os.environ.get("CXX") else []
        return [f"{toolchain.cuda}/bin/nvcc", *NVCC_FLAGS, *targets, *host]
    flags = SIMULATED_FLAGS if part is SIMULATED else FLAGS
    command = [*toolchain.compiler, *flags, *extra_flags()]
    if "binding" in unit.parts:
        command += ["-isystem", str(toolchain.torch / "include"), f"-I{folder}"]
    elif unit.stem == "cublaslt":
        command += ["-isystem", f"{toolchain.cublas}", "-isystem", f"{toolchain.cuda}/include"]
    if unit.suffix == ".cu":
        command += ["-isystem", f"{toolchain.cuda}/include", "-x", "c++"]
    return command


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
