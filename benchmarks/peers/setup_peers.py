"""Set up the engines that gpt2fast is compared with, each in an environment of its own:

    python setup_peers.py                                  those that PyPI has
    python setup_peers.py --llama-cpp ~/llama.cpp          and llama.cpp, built from that checkout
    python setup_peers.py llama_cpp --llama-cpp ~/llama.cpp --isa avx2
                                                           llama.cpp for compare.py --isa avx2

transformers is the one peer that needs no setting up: `pip install -e ".[bench]"` brings it.
Whatever fails leaves nothing behind; what is there already is left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

PACKAGES = {
    "ctranslate2": ("ctranslate2==4.8.5", "numpy"),
    "onnxruntime": ("onnxruntime==1.31.1", "onnx==1.23.2", "numpy"),
    "openvino": ("openvino==2026.4.1", "nncf==3.4.0", "numpy"),
    "llama_cpp": ("gguf==0.19.0", "numpy", "cmake", "ninja"),
    "xllamacpp": ("gguf==0.19.0", "numpy", "xllamacpp==2026.10.11549"),
}
DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / ".venv-peers"

_READY = "ready.json"
"""Written last into an environment: one without it is not finished."""
_SHIM = Path(__file__).resolve().parent / "llama_cpp_shim.cpp"

_INSTRUCTIONS = {
    None: (["-DGGML_NATIVE=ON"], "native"),
    # Without GGML_NATIVE all else is off: AVX-512, AVX-VNNI, AMX.
    "avx2": (
        ["-DGGML_NATIVE=OFF", *(f"-DGGML_{name}=ON" for name in ("AVX2", "FMA", "F16C", "BMI2"))],
        "x86-64-v3",
    ),
}
"""What --isa means to ggml's build, and to the compiler of the shim (-march)."""


class SetupError(Exception):
    """A failure to set a peer up, and the way out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "peers", nargs="*", help=f"some of {', '.join(PACKAGES)}; default: all that can be had"
    )
    parser.add_argument(
        "--into", type=Path, default=DEFAULT_FOLDER, help="folder for all of it: %(default)s"
    )
    parser.add_argument("--llama-cpp", type=Path, metavar="PATH", help="a checkout of llama.cpp")
    parser.add_argument(
        "--isa", choices=("avx2",), help="build llama.cpp for it, beside one for this processor"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--again", action="store_true", help="replace what is there already")
    options = parser.parse_args(argv)
    for peer in options.peers:
        if peer not in PACKAGES:
            parser.error(f"{peer} is not one of {', '.join(PACKAGES)}")
    peers = options.peers or [
        peer for peer in PACKAGES if peer != "llama_cpp" or options.llama_cpp is not None
    ]
    try:
        if "llama_cpp" in peers:
            _check_checkout(options.llama_cpp)
        for peer in peers:
            _set_up(peer, options.isa if peer == "llama_cpp" else None, options)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    return 0


def python_of(peer: str, folder: Path, isa: str | None = None) -> Path | None:
    """The interpreter of a peer's finished environment, or None; with `isa`, of the one that was
    built for it."""
    place = folder / _name(peer, isa)
    return place / "bin" / "python" if (place / _READY).is_file() else None


def _name(peer: str, isa: str | None) -> str:
    return f"{peer}-{isa}" if isa else peer


def _check_checkout(checkout: Path | None) -> None:
    if checkout is None:
        raise SetupError("llama_cpp is built from source: name a checkout with --llama-cpp PATH")
    for file in ("CMakeLists.txt", "include/llama.h", "ggml/CMakeLists.txt"):
        if not (checkout / file).is_file():
            raise SetupError(f"{checkout} is no checkout of llama.cpp: it has no {file}")
    if not (os.environ.get("CXX") or shutil.which("c++")):
        raise SetupError("there is no C++ compiler: install one, or name it in CXX")


def _set_up(peer: str, isa: str | None, options: argparse.Namespace) -> None:
    place = options.into / _name(peer, isa)
    if python_of(peer, options.into, isa) and not options.again:
        print(f"{peer}: already in {place} (--again replaces it)")
        return
    print(f"{peer}: setting up {place}", flush=True)
    shutil.rmtree(place, ignore_errors=True)  # an unfinished one, or one to be replaced
    try:
        venv.create(place, with_pip=True)
        packages = PACKAGES[peer]
        _run([place / "bin" / "python", "-m", "pip", "install", "-q", *packages])
        if peer == "llama_cpp":
            _build_llama_cpp(options.llama_cpp.resolve(), place.resolve(), isa, options.jobs)
        (place / _READY).write_text(json.dumps({"packages": packages}) + "\n")
    except BaseException as error:
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, OSError):
            raise SetupError(f"{place}: {error}") from error
        raise
    print(f"{peer}: ready", flush=True)


def _build_llama_cpp(checkout: Path, place: Path, isa: str | None, jobs: int) -> None:
    """libllama for this very CPU, or for an instruction set, and the shim on top of it, into the
    environment's lib."""
    switches, march = _INSTRUCTIONS[isa]
    tools = place / "bin"
    library = place / "lib"
    with tempfile.TemporaryDirectory(prefix="build-", dir=place) as folder:
        switched_off = ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")
        _run(
            [
                tools / "cmake", "-S", checkout, "-B", folder, "-G", "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}",
                "-DCMAKE_BUILD_TYPE=Release",
                "-DBUILD_SHARED_LIBS=ON",
                *switches,
                "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
                "-DCMAKE_INSTALL_RPATH=$ORIGIN",
                *(f"-DLLAMA_BUILD_{part}=OFF" for part in switched_off),
            ]
        )  # fmt: skip
        _run([tools / "cmake", "--build", folder, "--target", "llama", "-j", jobs])
        for built in Path(folder, "bin").glob("lib*"):
            shutil.copy2(built, library, follow_symlinks=False)
    includes = [f"-I{checkout / part / 'include'}" for part in (".", "ggml")]
    _run(
        [
            os.environ.get("CXX", "c++"), "-std=c++17", "-O3", f"-march={march}", "-shared",
            "-fPIC", *includes, _SHIM, "-o", library / "libllama_cpp_shim.so",
            f"-L{library}", "-lllama", "-Wl,-rpath,$ORIGIN",
        ]
    )  # fmt: skip


def _run(command: Sequence[object]) -> None:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SetupError(f"{words[0]} cannot be run: {error}") from error
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise SetupError(f"{' '.join(words)}\nfailed with exit code {done.returncode}:\n{last}")


if __name__ == "__main__":
    sys.exit(main())
