"""The CUDA kernels as nvcc compiles them, for which no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2fast.errors import BackendError
from gpt2fast.kernels import toolchain as compilation
from gpt2fast.kernels.library import find_library
from gpt2fast.kernels.toolchain import (
    CUDA,
    SIMULATED,
    Part,
    find_toolchain,
    source_files,
    source_folder,
)

ROOT = Path(__file__).parents[1]
RESOURCES = ROOT / "csrc" / "tests" / "resources.py"
SASS = RESOURCES.with_name("sass.py")


def _no_nvcc() -> str | None:
    try:
        find_toolchain(CUDA)
    except BackendError as error:
        return str(error)
    return None


pytestmark = pytest.mark.skipif(_no_nvcc() is not None, reason=str(_no_nvcc()))


@pytest.fixture(scope="session")
def library() -> Path:
    """The CUDA kernels for all architectures; compiled once, and kept beside other builds."""
    return find_library(CUDA, compilation.ARCHITECTURES).path


def in_new_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)  # nvcc takes most of it
def test_the_library_loads_without_a_gpu(library):
    """In a process of its own: tests of the simulator register the same ops."""
    code = f"""
import torch
torch.ops.load_library({str(library)!r})
prefix = "gpt2fast_cuda::"
for name in torch._C._dispatch_get_all_op_names():
    if name.startswith(prefix) and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        print(name.removeprefix(prefix))
"""
    done = in_new_process("-c", code)
    assert done.returncode == 0, done.stderr
    bindings = [
        path
        for path in (source_folder() / "binding" / "cuda").glob("*.cpp")
        if path.stem != "cublaslt" or compilation.find_cublas() is not None
    ]
    defined = {
        name
        for path in bindings
        for name in re.findall(r"^GPT2FAST_OP\(\s*(\w+),", path.read_text(encoding="utf-8"), re.M)
    }
    assert len(defined) > 10
    assert set(done.stdout.split()) == defined


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_library_is_not_linked_with_cublas(library):
    """Nor with any other of CUDA's libraries: what it needs of them is looked up."""
    needed = subprocess.check_output(["readelf", "-d", library], text=True)
    names = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert any(name.startswith("libtorch") for name in names)
    assert not [name for name in names if re.match("libcu|libnv", name)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_kernel_spills_or_needs_more_than_its_budget(library):
    done = in_new_process(RESOURCES, "--library", library)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_has_as_many_loads_under_way_as_before(library):
    done = in_new_process(SASS, "--library", library)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_more_than_the_budget_is_an_error(library, tmp_path):
    budget = tmp_path / RESOURCES.with_suffix(".json").name
    script = tmp_path / RESOURCES.name
    script.write_text(RESOURCES.read_text())
    text = RESOURCES.with_suffix(".json").read_text()
    registers = re.compile(r'("sum_partials<float>".*?"80": )(\d+)')
    budget.write_text(registers.sub(lambda found: f"{found[1]}{int(found[2]) - 8}", text))
    done = in_new_process(script, "--library", library)
    assert done.returncode == 1
    assert re.search(
        r"error: sum_partials<float> for sm_80: \d+ registers .*--write", done.stderr
    ), done.stderr


def test_nvcc_and_the_simulator_read_the_same_kernels():
    """The same files, with nothing in them that only one of the compilers sees."""
    files = {
        path
        for path in source_files(source_folder(), CUDA)
        # What calls cuBLASLt is the host's compiler's either way.
        if path.parent.name in ("kernels", "launch") and path.stem != "cublaslt"
    }
    by_nvcc, by_cpp = files_read(CUDA), files_read(SIMULATED)
    assert by_nvcc & files == files
    assert by_cpp & files == files
    for path in files:
        conditional = re.findall(r"^\s*#\s*(?:if|ifdef|ifndef|elif)\b.*", path.read_text(), re.M)
        assert conditional == [], path


def files_read(part: Part) -> set[Path]:
    """Files that the compiler of a part opens for the launchers."""
    folder, toolchain = source_folder(), find_toolchain(part)
    read = set()
    for unit in sorted((folder / "launch").glob("*.cu")):
        command = compilation._compile_command(unit, folder, toolchain, part)
        text = subprocess.check_output([*command, "-MM", str(unit)], text=True)
        names = text.partition(":")[2].replace("\\\n", " ").split()
        read |= {Path(name).resolve() for name in names}
    return read
