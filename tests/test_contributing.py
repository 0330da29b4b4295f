"""CONTRIBUTING.md's lists of files to touch are those of the source, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import gpt2fast
from documentation import ROOT, fences

PAGE = ROOT / "CONTRIBUTING.md"
SOURCE = ("*.py", "*.h", "*.cpp", "*.cu", "*.cuh", "*.yaml", "*.json")

MARKERS = {
    "An op": r"bias_gelu",
    "A head size": r"\b(MAX_)?HEAD_DIM\b|HeadDim<|heads of size up to|_head_dim(_limit)? = ",
    "An activation": r"\bsilu\b",
    "A sampling option": r"\bmin_p\b",
    "An optimizer": r"\bmuon\b",
    "A dtype": r"DType::bfloat16|ScalarType::BFloat16|torch\.bfloat16",
    "An instruction set": r"\bavx2_vnni\b|AVX_VNNI",
    "A format of packed weights": r"Format::float16\b",
    "A command": r"\bgpt2fast\.doctor\b|\bcli\.doctor\b",
}
"""By kind of change, the name of an existing example, which all source files it touches contain."""

EXCEPT = {
    "An op": {
        "gpt2fast/ops/decode.py": "calls the op",
        "gpt2fast/ops/cuda/mlp.py": "calls the op",
        "csrc/binding/cuda/cublaslt.cpp": "cuBLASLt's epilogue of that name",
    },
    "A dtype": {
        "csrc/tests": "cases in it",
    },
    "An optimizer": {
        "gpt2fast/cli/tune.py": "an example in --help",
        "gpt2fast/tuning/space.py": "an example in a docstring",
        "gpt2fast/configs/spaces/optimizer.yaml": "a space that tries it",
    },
}
"""Files, or folders of them, that name the marker and need no change, and why."""


def _sections() -> dict[str, str]:
    """The lists under "What to touch", by their headings."""
    _, _, lists = PAGE.read_text(encoding="utf-8").partition("\n## What to touch\n")
    parts = re.split(r"^### (.*)\n", lists, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


SECTIONS = _sections()


def _paths(text: str) -> list[str]:
    return re.findall(r"`([\w./-]+\.[a-z]+)`", text)


def _naming(marker: str) -> set[str]:
    """Files of the package and of csrc that name the marker, relative to the root."""
    found = set()
    for folder in ("gpt2fast", "csrc"):
        for pattern in SOURCE:
            for path in (ROOT / folder).rglob(pattern):
                relative = path.relative_to(ROOT).as_posix()
                if "/assets/" not in relative and re.search(marker, path.read_text("utf-8")):
                    found.add(relative)
    return found


def test_every_list_has_its_marker():
    assert list(SECTIONS) == list(MARKERS) and set(EXCEPT) <= set(MARKERS)


def test_every_path_exists():
    missing = [path for path in _paths(PAGE.read_text("utf-8")) if not (ROOT / path).is_file()]
    assert not missing


@pytest.mark.parametrize("kind", MARKERS)
def test_every_file_that_names_the_neighbor_is_listed(kind: str):
    listed, excepted = set(_paths(SECTIONS[kind])), EXCEPT.get(kind, {})
    naming = _naming(MARKERS[kind])
    left_out = {path for path in naming - listed if not path.startswith(tuple(excepted))}
    assert not left_out, f"CONTRIBUTING.md, {kind}: lists none of {sorted(left_out)}"
    idle = [path for path in excepted if not any(each.startswith(path) for each in naming - listed)]
    assert not idle, f"exceptions without a case: {idle}"


@pytest.mark.parametrize("kind", MARKERS)
def test_files_for_every_case_name_the_neighbor(kind: str):
    bold = re.findall(r"\*\*`([^`]+)`\*\*", SECTIONS[kind])
    assert bold
    neighbor = MARKERS[kind]
    if kind in ("A dtype", "A head size", "A format of packed weights", "A command"):
        neighbor += r"|float16|head_dim|doctor"  # tests and pages name it otherwise
    idle = [path for path in bold if not re.search(neighbor, (ROOT / path).read_text("utf-8"))]
    assert not idle, f"CONTRIBUTING.md, {kind}: {idle} do not name it"


def test_commands_name_what_is_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    text = PAGE.read_text("utf-8")
    named = set(re.findall(r"`make ([\w-]+)", text))
    for fence in fences(PAGE):
        assert fence.language == "sh"
        for command in fence.commands:
            words = command.split()
            if words[0] == "make":
                named |= set(words[1:])
            for word in words:
                if word.endswith(".py"):
                    assert (ROOT / word).is_file(), command
    assert named <= targets, f"no targets of make: {named - targets}"


def test_the_citation_has_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert str(cited["version"]) == gpt2fast.__version__


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name
)
def test_templates_are_yaml(path: Path):
    assert yaml.safe_load(path.read_text("utf-8"))
