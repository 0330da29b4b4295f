"""Interrupted preparations continue, or start over, and end with the same bytes."""

# ruff: noqa: F401, F811 (imported fixtures)

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2fast.data import DataModule, prepare_data
from gpt2fast.data.text import END_OF_TEXT
from gpt2fast.errors import DataError
from small_library import (
    LIBRARY,
    ROOT,
    STORY,
    Killed,
    contents,
    interrupt_after,
    interruptible,
    library,
    memory_growth,
    write,
)
from time_limits import patience

# -- interruption --------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    interruptible(monkeypatch, 1500)


@pytest.mark.parametrize("split", ["position", "documents"])
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    library, tmp_path, small_blocks, split, tokenizer
):
    second = write(tmp_path / "second.txt", STORY * 9)
    arguments = {"tokenizer": tokenizer, "vocab_size": 300, "split": split}
    straight = prepare_data([library, second], tmp_path / "straight", **arguments)
    assert not straight.resumed
    out = tmp_path / "interrupted"
    for calls in range(200):
        try:
            data = prepare_data(
                [library, second], out, **arguments, progress=interrupt_after(calls)
            )
            break
        except Killed:
            assert not (out / "meta.json").exists()
            # what was written after the last save is thrown away
            for name in ("train.bin", "val.bin"):
                if (out / ".unfinished" / name).exists():
                    with open(out / ".unfinished" / name, "ab") as file:
                        file.write(b"half a block")
    assert data.resumed
    assert 5 < calls < 60
    assert contents(out) == contents(straight.directory)


def test_continuing_does_not_begin_again(library, tmp_path, small_blocks):
    stages: list[str] = []

    def progress(stage, done, total):
        stages.append(stage)
        if len(stages) == len(whole) - 2:
            raise Killed

    whole: list[str] = []
    prepare_data(library, tmp_path / "whole", progress=lambda stage, *_: whole.append(stage))
    with pytest.raises(Killed):
        prepare_data(library, tmp_path / "out", progress=progress)
    rest: list[str] = []
    prepare_data(library, tmp_path / "out", progress=lambda stage, *_: rest.append(stage))
    assert set(rest) == {"encode"}
    assert len(rest) <= 3


@pytest.mark.parametrize("place", range(8))
def test_an_interruption_while_moving_into_place_does_no_harm(
    library, tmp_path, monkeypatch, place
):
    out = tmp_path / "out"
    prepare_data(library, out, tokenizer="bpe", vocab_size=300)
    fresh = prepare_data(library, tmp_path / "fresh").directory
    real, calls = os.replace, 0

    def failing(source, target):
        nonlocal calls
        if Path(target).parent == out or Path(source).parent == out:
            calls += 1
            if calls == place + 1:
                raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    try:
        prepare_data(library, out, overwrite=True)
    except Killed:
        monkeypatch.undo()
        if (out / "meta.json").exists():
            assert DataModule(out, 8, 2).meta.tokenizer == "bpe"  # still the old one, whole
        else:
            with pytest.raises(DataError, match="interrupted preparation"):
                DataModule(out, 8, 2)
        assert prepare_data(library, out).resumed
    assert calls > min(place, 6)
    assert contents(out) == contents(fresh)


def test_a_killed_process_is_continued(tmp_path):
    path = write(tmp_path / "book.txt", STORY * 30_000)
    script = f"""
import os, signal
from gpt2fast.data import preparation, prepare_data
preparation.PACE = preparation.Pace(seconds_between_saves=0.0)
def progress(stage, done, total):
    if stage == "encode" and done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
prepare_data({str(path)!r}, {str(tmp_path / "out")!r}, progress=progress)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=patience())
    assert killed.returncode == -signal.SIGKILL
    done = []
    data = prepare_data(path, tmp_path / "out", progress=lambda stage, d, t: done.append(d / t))
    assert data.resumed
    assert min(done) > 0.4
    straight = prepare_data(path, tmp_path / "straight").directory
    assert contents(data.directory) == contents(straight)


def test_an_interrupted_pipe_leaves_nothing_and_starts_again(library, tmp_path, monkeypatch):
    def pipe(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    pipe(LIBRARY)
    with pytest.raises(Killed):
        prepare_data("-", tmp_path / "out", progress=interrupt_after(1))
    assert not (tmp_path / "out").exists()

    with pytest.raises(Killed):
        prepare_data(library, tmp_path / "out", progress=interrupt_after(4))
    # What a pipe leaves if the machine stops: all that an interrupted run has but run.json.
    (tmp_path / "out" / ".unfinished" / "run.json").unlink()
    assert (tmp_path / "out" / ".unfinished" / "plan.json").exists()
    pipe(STORY)
    data = prepare_data("-", tmp_path / "out")
    assert not data.resumed
    pipe(STORY)
    assert contents(data.directory) == contents(prepare_data("-", tmp_path / "new").directory)


def interrupted_run(path: Path, out: Path, **arguments) -> None:
    with pytest.raises(Killed):
        prepare_data(path, out, **arguments, progress=interrupt_after(1))


@pytest.mark.parametrize("change", ["longer", "touched", "other file", "settings"])
def test_an_interrupted_run_is_not_continued_with_something_else(
    library, tmp_path, small_blocks, change
):
    out = tmp_path / "out"
    interrupted_run(library, out)
    arguments: dict = {}
    if change == "longer":
        write(library, LIBRARY + "more")
        message = r"library\.txt has changed since the interrupted run"
    elif change == "touched":
        os.utime(library, ns=(1, 1))
        message = r"library\.txt has changed since the interrupted run"
    elif change == "other file":
        library = write(tmp_path / "other.txt", LIBRARY)
        message = "interrupted run on other files"
    else:
        arguments = {"val_fraction": 0.3}
        message = r"other settings \(val_fraction 0\.1, now 0\.3\)"
    with pytest.raises(DataError, match=f"{message}.*start over with --overwrite"):
        prepare_data(library, out, **arguments)
    assert (out / ".unfinished" / "run.json").exists()  # the mistake does not cost the work
    assert not prepare_data(library, out, **arguments, overwrite=True).resumed
    assert os.path.exists(out / "meta.json") and not (out / ".unfinished").exists()


def test_a_file_that_changes_while_it_is_read_is_noticed(library, tmp_path):
    def growing(stage, done, total):
        if stage == "encode":
            with open(library, "a") as file:
                file.write(f"\n{END_OF_TEXT}\nmore")

    for split in ("position", "documents"):
        with pytest.raises(DataError, match="has changed while it was being read"):
            prepare_data(library, tmp_path / "out", split=split, progress=growing)
        assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_text(tmp_path):
    small = write(tmp_path / "small.txt", STORY * 20_000)  # 3 MB
    large = write(tmp_path / "large.txt", STORY * 120_000)
    assert memory_growth(tmp_path / "out", small, large) < 10_000
