"""The pages of docs/ stay true: what stands first runs in a minute, and the snippets run.

Each page has a folder of its own, with README.md, docs/ and a `book.txt` of some hundred kilobytes.
The first block of a page runs as it is written, but for what is in `INSTEAD`; these tests are slow.
All snippets of Python run in this process, with what takes long cut down by `SHORTER`.
"""

from __future__ import annotations

import importlib.util
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch

import gpt2fast
from documentation import ROOT, Fence, fences, in_a_shell, run
from gpt2fast.sampling import PROCESSORS, STEPWISE

BEGIN_WITH_A_MINUTE = (
    "data",
    "distributed",
    "evaluation",
    "finetuning",
    "inference",
    "logs",
    "modules",
    "serving",
    "training",
    "transformers",
    "tuning",
)
"""Pages for people who use gpt2fast."""

OTHERS = {"STATUS", "architecture", "performance", "security", "simulator"}
"""Pages about it."""

INSTEAD = {
    "torchrun ": "python -m torch.distributed.run ",  # the same, of this Python
}
"""Beginnings of commands, and what stands in for them."""

EXTRAS = {
    'pip install "gpt2fast[logs]"': ("matplotlib", "tensorboard"),
    'pip install "gpt2fast[serve]"': ("llguidance", "prometheus_client", "starlette", "uvicorn"),
    'pip install "gpt2fast[tune]"': ("matplotlib", "optuna"),
    'pip install "gpt2fast[hf]"': ("transformers",),
}
"""Commands that install, which are not run, and what is there afterward."""

SHORTER = {"max_steps=50": "max_steps=2, batch_size=2, block_size=16, eval_batches=1"}
"""Text of snippets, and what stands in for it."""

BEFORE = {
    "data": "gpt2fast prepare book.txt --tokenizer char --out data/book",
}
"""Commands to run before a page's snippets of Python."""

SECONDS = 60.0
"""Time on one core for everything in a first block but installing."""

PAGES = {name: fences(ROOT / "docs" / f"{name}.md") for name in BEGIN_WITH_A_MINUTE}
SNIPPETS = [
    pytest.param(name, fence, id=f"{name}-line{fence.line}")
    for name, page in PAGES.items()
    for fence in page
    if fence.language == "python"
]


@pytest.fixture
def in_readers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.py"))
    pages = [tmp_path / "README.md", *sorted((tmp_path / "docs").glob("*.md"))]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    gpt2fast.backend("auto")


def test_no_page_is_forgotten():
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} == {*PAGES, *OTHERS}


@pytest.mark.parametrize("name", PAGES)
def test_begins_with_a_command(name: str):
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert PAGES[name][0].language == "sh"
    before = text[: text.index("```")]
    assert "\n## " not in before, "the first section comes before the first command"
    assert re.search(r"\b(minute|seconds)\b", before), "it does not say how long that takes"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PAGES)
def test_the_first_block_runs_in_a_minute(name: str, in_readers_folder: None):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for line in PAGES[name][0].commands:
        if line in EXTRAS:
            _skip_without(line)
            continue
        for written, instead in INSTEAD.items():
            line = instead + line.removeprefix(written) if line.startswith(written) else line
        in_a_shell(line)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime
    assert seconds < SECONDS, f"docs/{name}.md begins with {seconds:.0f} s of work for one core"


@pytest.mark.parametrize(("name", "fence"), SNIPPETS)
def test_snippets_run(name: str, fence: Fence, in_readers_folder: None):
    if name in BEFORE:
        run(BEFORE[name])
    fence.execute(SHORTER)


NAMES = [
    *PROCESSORS, *STEPWISE,
    "logit_bias", "bad_words_ids", "min_new_tokens", "max_length", "max_time",
]  # fmt: skip


def test_every_option_of_choosing_tokens_is_explained():
    page = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
    assert (
        re.findall(r"^\| `(\w+)` \|", page.partition("| option |")[2], re.MULTILINE)[: len(NAMES)]
        == NAMES
    )


def test_no_exception_outlives_its_text():
    commands = [line for page in PAGES.values() for fence in page for line in fence.commands]
    snippets = "".join(fence.text for page in PAGES.values() for fence in page)
    for beginning in (*INSTEAD, *EXTRAS):
        assert any(line.startswith(beginning) for line in commands), beginning
    for written in SHORTER:
        assert written in snippets, written


def _skip_without(installation: str) -> None:
    """Skip unless the packages of the command are here; they must be an extra of this project."""
    extra = re.search(r"\[(\w+)\]", installation)
    assert extra is not None
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf"^{extra[1]} = \[$", pyproject, re.MULTILINE)
    for module in EXTRAS[installation]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: {installation}")
