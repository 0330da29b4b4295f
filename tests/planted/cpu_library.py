"""Compiles the CPU kernels with every bug of cpu_bugs.py in them, of which one shows at a time.

    python tests/planted/cpu_library.py FOLDER     prints the library's path

The library's GPT2FAST_PLANTED, read as it is loaded, is the number of the bug that shows; without
it none does. One library for all is compiled in the time that one bug would take.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from unittest import mock

from bugs import ROOT, planted
from cpu_bugs import BUGS
from gpt2fast.kernels import toolchain as compilation
from gpt2fast.kernels.toolchain import CPU, FLAGS, compile_library, find_toolchain, source_files
from gpt2fast.ops.native import loaded, unavailable


def instruction_set() -> str:
    """The instruction set of this machine's kernels."""
    found = loaded()
    if found is None:
        sys.exit(f"no kernels to plant bugs in: {unavailable()}")
    return found.isa


_STUB = """#include "../kernels.h"
namespace gpt2fast {{
extern const KernelTable kernels_{0};
const KernelTable kernels_{0} = {{"{0}", nullptr, {{}}}};
}}
"""


def _write_sources(folder: Path, isa: str) -> None:
    """csrc with every bug in it: `gpt2fast_planted` says which shows."""
    shutil.copytree(ROOT / "csrc", folder, ignore=shutil.ignore_patterns("tests", "device"))
    numbers = {bug: number for number, bug in enumerate(BUGS, 1)}
    for file in {bug.file for bug in BUGS}:
        path = folder.parent / file
        bugs = [bug for bug in BUGS if bug.file == file]
        path.write_text(
            planted(
                path.read_text(),
                bugs,
                lambda bug, right: f"(gpt2fast_planted == {numbers[bug]} ? {bug.wrong} : {right})",
            )
        )
    kernels, chosen = folder / "cpu" / "kernels.h", folder / "cpu" / "isa.cpp"
    kernels.write_text(
        kernels.read_text().replace("#pragma once", "#pragma once\nextern int gpt2fast_planted;")
    )
    chosen.write_text(
        chosen.read_text()
        + 'static const char* planted = std::getenv("GPT2FAST_PLANTED");\n'
        + "int gpt2fast_planted = planted == nullptr ? 0 : std::atoi(planted);\n"
    )
    # One instruction set is enough, and the others take as long to compile.
    own = folder / "cpu" / "isa" / f"{isa}.cpp"
    needed = {isa, *re.findall(r"#define GPT2FAST_OPS_OF (\w+)", own.read_text())}
    for path in own.parent.glob("*.cpp"):
        if path.stem not in needed:
            path.write_text(_STUB.format(path.stem))


def build(keep: Path) -> Path:
    """The library of kernels with all bugs, in the folder `keep` and made if it is not there.

    The environment's GPT2FAST_PLANTED chooses one of them, as it is loaded.
    """
    isa = instruction_set()
    key = sha256(repr([isa, BUGS, FLAGS]).encode() + Path(__file__).read_bytes())
    for path in source_files(ROOT / "csrc", CPU):
        key.update(path.read_bytes())
    keep.mkdir(parents=True, exist_ok=True)
    library = keep / f"planted-{isa}-{key.hexdigest()[:12]}.so"
    if library.is_file():
        return library
    for old in keep.glob("planted-*"):
        old.unlink()
    sources = keep / "csrc"
    shutil.rmtree(sources, ignore_errors=True)
    _write_sources(sources, isa)
    # Optimized less: it compiles in half the time.
    flags = {"CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} -O1".strip()}
    with (
        mock.patch.object(compilation, "source_folder", return_value=sources),
        mock.patch.dict(os.environ, flags),
    ):
        compile_library(library, find_toolchain(CPU), CPU)
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
