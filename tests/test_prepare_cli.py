"""The command line of `python -m gpt2fast.prepare`."""

# ruff: noqa: F401, F811 (imported fixtures)

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt2fast.cli import prepare as command
from small_library import LIBRARY, ROOT, contents, library, shared_book
from time_limits import patience, wait_until

# -- the command line ----------------------------------------------------------------------------


def run(capsys, *arguments) -> tuple[int, str, str]:
    try:
        code = command.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


FLAGS = {
    "tokenizer": (["--tokenizer", "bpe"], lambda meta: meta["tokenizer"] == "bpe"),
    "vocab size": (
        ["--tokenizer", "bpe", "--vocab-size", "280"],
        lambda meta: meta["vocab_size"] == 280,
    ),
    "underscores": (
        ["--tokenizer=bpe", "--vocab_size=280"],
        lambda meta: meta["vocab_size"] == 280,
    ),
    "split": (["--split", "documents"], lambda meta: meta["documents"]["val"] > 0),
    "fraction": (["--val-fraction", "0.5"], lambda meta: meta["val_tokens"] > 6000),
}


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_changes_the_outcome(library, tmp_path, capsys, name):
    flags, holds = FLAGS[name]
    assert run(capsys, library, "--out", tmp_path / "plain")[0] == 0
    code, out, _ = run(capsys, library, "--out", tmp_path / "out", *flags)
    assert code == 0
    assert holds(json.loads((tmp_path / "out" / "meta.json").read_text()))
    assert contents(tmp_path / "out") != contents(tmp_path / "plain")
    assert f"next: python -m gpt2fast.train --data {tmp_path / 'out'}" in out


def test_the_seed_flag_chooses_other_documents(library, tmp_path, capsys):
    held_out = []
    for seed in (0, 1, 1):
        run(
            capsys, library, "--out", tmp_path / "out", "--overwrite",
            "--split", "documents", "--seed", seed,
        )  # fmt: skip
        documents = json.loads((tmp_path / "out" / "meta.json").read_text())["documents"]
        held_out.append([document["title"] for document in documents["held_out"]])
    assert held_out[0] != held_out[1] == held_out[2]


def test_the_overwrite_flag_replaces(library, shared_book, tmp_path, capsys):
    assert run(capsys, library, "--out", tmp_path / "out")[0] == 0
    code, _, error = run(capsys, shared_book, "--out", tmp_path / "out")
    assert code == 1
    assert error.startswith("error: ") and "--overwrite" in error
    assert run(capsys, shared_book, "--out", tmp_path / "out", "--overwrite")[0] == 0
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["sources"] == ["book.txt"]


def test_the_output_has_a_natural_default(shared_book, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "book.txt")
    assert code == 0
    assert (tmp_path / "data" / "book" / "meta.json").exists()
    assert "--data data/book" in out


def test_standard_input_is_read(library, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LIBRARY.encode())))
    code, _, error = run(capsys, "-", "--out", tmp_path / "piped", "--tokenizer", "bpe")
    assert (code, error) == (0, "")
    run(capsys, library, "--out", tmp_path / "file", "--tokenizer", "bpe")
    piped, file = contents(tmp_path / "piped"), contents(tmp_path / "file")
    assert json.loads(piped.pop("meta.json"))["sources"] == ["-"]
    file.pop("meta.json")
    assert piped == file


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "INPUT"),
        (["book.txt", "--no-such-flag"], 2, "--no-such-flag"),
        (["book.txt", "--split", "random"], 2, "invalid choice: 'random'"),
        (["book.txt", "--val-fraction", "2"], 2, "between 0 and 1"),
        (["book.txt", "--vocab-size", "300"], 2, "--tokenizer bpe"),
        (["book.txt", "--seed", "3"], 2, "--split documents"),
        (["book.txt", "--tokenizer", "bpe", "--vocab-size", "0"], 2, "--vocab-size is 0"),
        (["book.txt", "--out", ""], 2, "--out is empty"),
        (["nowhere.txt"], 1, "error: nowhere.txt does not exist\n"),
        (["book.txt", "--out", "book.txt"], 1, "error: book.txt is a file"),
    ],
)
def test_mistakes_on_the_command_line_end_with_one_line(
    shared_book, capsys, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(shared_book.parent)
    found, _, error = run(capsys, *arguments)
    assert found == code
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (shared_book.parent / "data").exists()


def test_the_progress_line_is_for_terminals_only(library, tmp_path, capsys, monkeypatch):
    assert run(capsys, library, "--out", tmp_path / "quiet")[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(command.time, "monotonic", iter(range(10**6)).__next__)
    error = run(capsys, library, "--out", tmp_path / "shown")[2]
    assert "reading: 100 %" in error and "encoding: 100 %" in error
    assert error.endswith("\r\x1b[K")


def test_ctrl_c_ends_quietly(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-m", "gpt2fast.prepare", "-", "--out", str(out)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until((out / ".unfinished" / "stdin").exists, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(patience()) == 130
        assert process.stderr.read() == "interrupted\n"
    assert not out.exists()  # what came through a pipe cannot be continued


@pytest.mark.parametrize("redirection", ["| true", ">&-", "> /dev/full"])
def test_a_lost_reader_is_no_error(library, tmp_path, redirection):
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    command = f"{sys.executable} -m gpt2fast.prepare {library} --out {tmp_path / 'out'}"
    shell = f"{command} {redirection}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "meta.json").exists()
