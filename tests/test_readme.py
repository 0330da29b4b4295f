"""README.md stays true: its commands and snippets run, in the order in which they stand there.

They run as they are written, in a folder where a reader's files have been laid out: a directory
`gpt2` with a small model of random weights (a name that exists as a path is not looked for on the
hub), and a `book.txt`. What differs from a reader's session is listed in `ADDED`, `REPLACED` and
`ELSEWHERE`, and nowhere else.
"""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import gpt2fast
from documentation import ROOT, Fence, fences, run
from gpt2fast import GPT2, GPT2Config
from gpt2fast.tokenizer import BPETokenizer

ADDED = {
    # A run of minutes or hours becomes one of two steps, a resumed one gets one step more.
    "train": "--max-steps 2 --batch-size 2 --block-size 16 --eval-batches 1 --threads 1",
    "train --resume": "--max-steps 3 --threads 1",
    "tune": "--trials 1 --max-steps 2 --batch-size 2 --block-size 16 --eval-batches 1",
    "generate": "--max-new-tokens 8",
}
"""Flags that a command gets at its end, by its beginning."""

REPLACED = {
    "curl -LO https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
    "input.txt": "cp book.txt input.txt",
}
"""Commands that need a network, and what stands in for them."""

ELSEWHERE = {
    "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt . && .venv/bin/python -m "
    'gpt2fast.generate "Once upon a time"': ".ci/run runs it",
    'python3 -m venv .venv-test && .venv-test/bin/pip install -q -c constraints.txt -e ".[test]" '
    "&& .venv-test/bin/python -m pytest -q -n auto --dist loadfile tests": (
        ".ci/run runs it; this is a part of it"
    ),
    "make setup check test": "installs; .ci/run does the same, step by step",
    "cmake -S . -B build && cmake --build build --parallel && ctest --test-dir build": (
        ".ci/run runs it, with sanitizers as well"
    ),
    ".ci/run": "runs these tests",
    "make gpu-check": "needs a GPU, and minutes",
}
"""Commands that are not run here, and why."""

INSTALLED = r"python3 -m venv (\S+) && \1/bin/pip install -q -c constraints\.txt .* && \1/bin/"


FENCES = fences(ROOT / "README.md")
COMMANDS = [command for fence in FENCES if fence.language == "sh" for command in fence.commands]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of someone who reads README.md from top to bottom."""
    folder = tmp_path_factory.mktemp("reader")
    sources = sorted((ROOT / "gpt2fast").rglob("*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    (folder / "book.txt").write_text(text, encoding="utf-8")
    tokenizer = BPETokenizer.train([text[:50_000]], 400)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_positions=256, n_layer=1, n_head=2, n_embd=16)
    GPT2(config).save_pretrained(folder / "gpt2", tokenizer)
    return folder


@pytest.fixture
def in_readers_folder(reader: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(reader)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small has no work for two
    yield
    torch.set_num_threads(threads)
    gpt2fast.backend("auto")


def test_every_block_is_of_a_kind_that_is_checked():
    assert FENCES
    for fence in FENCES:
        assert fence.language in ("sh", "python", "text"), (
            f"README.md, line {fence.line}: blocks are sh (run), python (run) or text (a sample)"
        )


def test_no_exception_outlives_its_command():
    assert set(REPLACED) | set(ELSEWHERE) <= set(COMMANDS)


@pytest.mark.parametrize("fence", [f for f in FENCES if f.language == "sh"], ids=str)
def test_commands_run(fence: Fence, in_readers_folder: None):
    for line in fence.commands:
        if line not in ELSEWHERE:
            run(REPLACED.get(line, line), ADDED)


@pytest.mark.parametrize("fence", [f for f in FENCES if f.language == "python"], ids=str)
def test_snippets_run(fence: Fence, in_readers_folder: None):
    fence.execute()


def test_the_sample_is_what_the_first_command_prints_at_the_beginning():
    prompt = shlex.split(COMMANDS[0])[-1]
    samples = [fence for fence in FENCES if fence.language == "text"]
    assert samples, "README.md shows no sample of the bundled model's text"
    assert samples[0].text.startswith(prompt)
    assert len(samples[0].text) > len(prompt) + 100


def test_the_two_commands_install_what_the_constraints_hold():
    """The first writes, the second tests; each is one line, with an environment of its own."""
    environments = []
    for command, purpose in zip(COMMANDS[:2], ("gpt2fast.generate", "pytest"), strict=True):
        found = re.match(INSTALLED + f"python -m {purpose} ", command)
        assert found, f"{command!r} is not `venv && pip install && python -m {purpose}`"
        environments.append(found[1])
    assert len(set(environments)) == 2


def test_the_first_command_writes(in_readers_folder: None):
    arguments = COMMANDS[0].partition("-m gpt2fast.generate ")[2]
    written = run(f"gpt2fast generate {arguments}", ADDED)
    assert written.startswith(shlex.split(arguments)[0])


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("https://"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
