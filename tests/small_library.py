"""A small library of stories, and prepared data read back, for the tests of data."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from gpt2fast.data import preparation
from gpt2fast.data.text import END_OF_TEXT
from gpt2fast.tokenizer import BPETokenizer

ROOT = Path(__file__).parents[1]
STORY = (
    "Once upon a time there was a king who had three sons, and he loved them all. "
    "The eldest went out to see the world; the second stayed; the youngest sang.\n\n"
)
BOOKS = [f"Book {n}\n\n" + STORY * (n + 2) for n in range(12)]
LIBRARY = f"\n{END_OF_TEXT}\n".join(BOOKS)

PIECE_LIST = [
    *(
        "a",
        "the",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        "\t",
        ".",
        ",",
        "!",
        "'s",
        "'ll",
        "'",
        "12",
    ),
    *(*"éüя的。😀\u0301\u00a0\u2028\u001c½<", "<|", "|>"),
    *(END_OF_TEXT, f"\n{END_OF_TEXT}\n", f"{END_OF_TEXT}\n", "\x01", "\ufeff", "_", "<x y>", ";"),
]
PIECES = st.sampled_from(PIECE_LIST)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def tokens_of(directory: Path, split: str) -> list[int]:
    meta = json.loads((directory / "meta.json").read_text())
    tokens = array("H" if meta["dtype"] == "uint16" else "I")
    tokens.frombytes((directory / f"{split}.bin").read_bytes())
    return tokens.tolist()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def plain(text: str) -> str:
    """A text as it is to be encoded: Python's newlines, no newline after a separator line."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"(?m)^<\|endoftext\|>\n", END_OF_TEXT, text)


def set_pace(monkeypatch: pytest.MonkeyPatch, **amounts: float) -> None:
    """Work on small amounts at a time. No setting of prepare's: no token depends on it."""
    monkeypatch.setattr(preparation, "PACE", preparation.Pace(**amounts))  # type: ignore[arg-type]


def interruptible(monkeypatch: pytest.MonkeyPatch, block_size: int) -> None:
    """Work on blocks of that size, and save after each."""
    set_pace(monkeypatch, block_size=block_size, seconds_between_saves=-1.0)


class Killed(BaseException):
    """Stands for a power cut: nothing of prepare's handles it."""


def interrupt_after(calls: int) -> Callable[[str, int, int], None]:
    """A `progress` that allows so many calls."""

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls -= 1
        assert 0 <= done <= total
        if calls < 0:
            raise Killed

    return progress


def memory_growth(out: Path, small: Path, large: Path, **arguments: object) -> int:
    """Kilobytes by which preparing `large` raises the memory that `small` took."""
    pytest.importorskip("resource")
    script = f"""
import resource, sys
from gpt2fast.data import prepare_data
for path in sys.argv[2:]:
    prepare_data(path, sys.argv[1], overwrite=True, **{arguments!r})
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, out, small, large],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = map(int, done.stdout.split())
    return second - first


@pytest.fixture
def shared_book(tmp_path):
    return write(tmp_path / "book.txt", STORY * 20)


@pytest.fixture
def library(tmp_path):
    return write(tmp_path / "library.txt", LIBRARY)


@pytest.fixture(scope="module")
def bpe():
    # Trained on what it will be tested with, so that it has tokens that a wrong cut would tear.
    draw = random.Random(1)
    return BPETokenizer.train([LIBRARY, "".join(draw.choices(PIECE_LIST, k=20_000))], 1000)


@pytest.fixture(scope="module")
def bpe_dir(bpe, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    bpe.save_pretrained(directory)
    return directory
