"""Contents of the installed package, and the cost of importing it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import gpt2fast
from fake_compiler import FakeCompiler
from gpt2fast.kernels.toolchain import source_files

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"

LAZY = (
    "transformers",
    "jsonargparse",
    "rich",
    "tiktoken",
    "tokenizers",
    "huggingface_hub",
    "safetensors",
    "yaml",
    "tensorboard",
    "matplotlib",
    "wandb",
    "optuna",
    "datasets",
    "pyarrow",
    "triton",
    "torch._dynamo",
)
"""Imported by the functions that need them, and not before."""


def test_importing_gpt2fast_adds_little_to_importing_torch():
    """At most 0.3 s, on the processor: what else the machine does is not ours to answer for."""
    code = (
        "import os, torch; before = sum(os.times()[:4]); import gpt2fast;"
        "print(sum(os.times()[:4]) - before)"
    )
    seconds = min(float(run_here(code)) for _ in range(3))
    assert seconds <= 0.3, 'see python -X importtime -c "import torch, gpt2fast"'


def test_importing_gpt2fast_loads_nothing_that_only_some_calls_need():
    code = (
        "import sys, torch; before = set(sys.modules); import gpt2fast;"
        f"print(sorted(set({LAZY}) & (set(sys.modules) - before)))"
    )
    assert run_here(code) == "[]"


def run_here(code: str) -> str:
    """Output of a new interpreter that runs `code` and finds this tree."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build needs, where importing torch would fail."""
    pytest.importorskip("setuptools", "77")
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("gpt2fast", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "torch.py").write_text("raise ImportError('the build imports torch')")
    return tree


def build_wheel(tree: Path, into: Path, **environment: str) -> Path:
    """The wheel that pip builds from `tree`."""
    command = [
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index"),
        *("--no-build-isolation", "--wheel-dir", str(into), str(tree)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(tree), **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without compiled kernels."""
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"), GPT2FAST_NATIVE="0")


def in_package(wheel: Path) -> set[str]:
    """The files of the package in `wheel`."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path):
    source = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gpt2fast").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    kernels = {f"gpt2fast/csrc/{path.relative_to(CSRC)}" for path in source_files(CSRC)}
    assert in_package(wheel) == source | kernels
    assert {"gpt2fast/py.typed", "gpt2fast/configs/adventures.yaml"} <= source
    assert "gpt2fast/assets/adventures/model.safetensors" in source
    assert {"gpt2fast/csrc/binding/cpu/tensors.h", "gpt2fast/csrc/kernels/rows.cuh"} <= kernels


def test_with_a_compiler_the_wheel_is_for_this_platform_and_every_python(
    tree: Path, wheel: Path, tmp_path: Path
):
    if not (Path(torch.__file__).with_name("include")).is_dir():
        pytest.skip("torch came without its headers")
    compiler = FakeCompiler(tmp_path / "compiler")
    built = build_wheel(tree, tmp_path / "dist", CXX=str(compiler.path), GPT2FAST_NATIVE="1")
    assert in_package(built) == in_package(wheel) | {"gpt2fast/libgpt2fast_native.so"}
    name = f"gpt2fast-{gpt2fast.__version__}-py3-none-"
    assert built.name.startswith(name) and "any" not in built.name


@pytest.mark.parametrize("missing", ["compiler", "success"])
def test_an_install_does_not_fail_for_want_of_compiled_kernels(
    missing: str, tree: Path, wheel: Path, tmp_path: Path
):
    compiler = FakeCompiler(tmp_path / "compiler")
    if missing == "success":
        compiler.behave("broken")
    command = "no-such-compiler" if missing == "compiler" else str(compiler.path)
    built = build_wheel(tree, tmp_path / "dist", CXX=command, GPT2FAST_NATIVE="1")
    assert built.name == wheel.name and in_package(built) == in_package(wheel)


def test_the_source_distribution_holds_what_a_build_needs(tree: Path, tmp_path: Path):
    code = f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.iterdir()
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{path.relative_to(CSRC)}" for path in source_files(CSRC)} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "gpt2fast/kernels/library.py"} <= names


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    """The wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return HeaderParser().parsestr(archive.read(path).decode("utf-8"))


def test_the_wheel_fits_every_python_and_platform(wheel: Path, metadata: Message):
    assert wheel.name == f"gpt2fast-{gpt2fast.__version__}-py3-none-any.whl"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"


def test_installing_brings_the_console_command(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        written = archive.read(path).decode("utf-8").split()
    assert written == ["[console_scripts]", "gpt2fast", "=", "gpt2fast.__main__:run"]


def test_installing_brings_no_test_tools(metadata: Message):
    entries = metadata.get_all("Requires-Dist", [])
    names = {_name(entry) for entry in entries if "extra ==" not in entry}
    assert "torch" in names
    assert not names & {"transformers", "pytest", "pytest-timeout", "hypothesis", "ruff", "mypy"}


def test_the_constraints_hold_everything_that_is_installed(metadata: Message):
    """Every package that gpt2fast and its tests need, and what those need, has one version."""
    held = set()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            requirement = line.partition(";")[0].strip()
            assert re.fullmatch(r"[\w.-]+==[\w.]+", requirement), line
            held.add(_name(requirement))
    installed = {_name(found.name) for found in importlib.metadata.distributions()}
    waiting = {_name(entry) for entry in metadata.get_all("Requires-Dist", [])} - {"gpt2fast"}
    needed: set[str] = set()
    while waiting:
        name = waiting.pop()
        needed.add(name)
        # What is not installed here is for another platform or another Python.
        requires = (importlib.metadata.requires(name) or []) if name in installed else []
        waiting |= {_name(entry) for entry in requires if _applies(entry)} - needed
    assert needed & installed <= held


def _applies(requirement: str) -> bool:
    """True if a requirement without extras is for this Python on this platform."""
    marker = Requirement(requirement).marker
    return marker is None or marker.evaluate({"extra": ""})


def _name(requirement: str) -> str:
    """The name in a requirement, as package indexes spell it."""
    found = re.match(r"[\w.-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()
