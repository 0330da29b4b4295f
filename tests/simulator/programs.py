"""Builds what runs in the simulator with CMake, or says what is missing for it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[2]


class Missing(Exception):
    """Something that is not installed is needed to build."""


def cuda_headers() -> Path:
    """The folder with CUDA's headers: of a toolkit, or of NVIDIA's packages from PyPI."""
    home = os.environ.get("CUDA_HOME")
    folders = [Path(home, "include")] if home else []
    folders.append(Path("/usr/local/cuda/include"))
    for site in map(Path, sys.path):
        folders += sorted(site.glob("nvidia/*/include"), reverse=True)
    for folder in folders:
        if (folder / "cuda_bf16.h").is_file() and (folder / "crt" / "host_config.h").is_file():
            return folder
    raise Missing(
        "no CUDA headers: set CUDA_HOME, or install nvidia-cuda-runtime, nvidia-cuda-crt and "
        "nvidia-cuda-cccl"
    )


def package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    locations = spec.submodule_search_locations if spec is not None else None
    return Path(locations[0]) if locations else None


def build(target: str, folder: Path, sanitize: str = "") -> Path:
    """The folder where the target then is; what is up to date isn't compiled again."""
    for tool in ("cmake", "g++"):
        if shutil.which(tool) is None:
            raise Missing(f"no {tool}")
    definitions = {
        "GPT2FAST_SIMULATOR": "ON",
        "GPT2FAST_SANITIZE": sanitize,
        "GPT2FAST_CUDA_INCLUDE": str(cuda_headers()),
        "PYBIND11_FINDPYTHON": "ON",
        "Python_EXECUTABLE": sys.executable,
    }
    if (pybind11 := package_folder("pybind11")) is not None:
        definitions["pybind11_DIR"] = str(pybind11 / "share" / "cmake" / "pybind11")
    if (cutlass := package_folder("cutlass_library")) is not None:
        definitions["GPT2FAST_CUTLASS_INCLUDE"] = str(cutlass / "source" / "include")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # several test processes build in one folder
        run(
            "cmake",
            "-S",
            ROOT,
            "-B",
            folder,
            *generator,
            *(f"-D{k}={v}" for k, v in definitions.items()),
        )
        run("cmake", "--build", folder, "--target", target, "--parallel", "2")
    return folder


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
