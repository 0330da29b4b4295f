"""The command lines: one list of them, three ways to call each, and the flags that they share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpt2fast
from gpt2fast.__main__ import main
from gpt2fast._system.invocation import as_called, command_line
from gpt2fast.cli.arguments import CommandParser, hyphenated
from gpt2fast.cli.command import COMMANDS
from gpt2fast.errors import did_you_mean

ROOT = Path(__file__).parents[1]
CONSOLE = "import sys; sys.argv[0] = 'bin/gpt2fast'; from gpt2fast.__main__ import run; run()"
"""The script that pip writes for the entry point."""

WAYS = {
    "gpt2fast doctor": ["-c", CONSOLE, "doctor"],
    "python -m gpt2fast doctor": ["-m", "gpt2fast", "doctor"],
    "python -m gpt2fast.doctor": ["-m", "gpt2fast.doctor"],
}


def call(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_call_a_command_is_one_command_that_says_how_it_was_called(way):
    shown = call(*WAYS[way], "--help")
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"usage: {way} [-h]")
    assert f"\n{way}\n" in shown.stdout  # the example
    wrong = call(*WAYS[way], "--bakcend", "torch")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean --backend?" in wrong.stderr and wrong.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["-c", CONSOLE], ["-m", "gpt2fast"], ["-m", "gpt2fast", "--help"]], ids=str
)
def test_the_package_lists_its_commands(arguments):
    shown = call(*arguments)
    assert shown.returncode == 0
    for name, about in COMMANDS.items():
        (line,) = (line for line in shown.stdout.splitlines() if f"gpt2fast {name}" in line)
        assert line.endswith(about)


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"gpt2fast {gpt2fast.__version__}\n"


@pytest.mark.parametrize(
    ("name", "hint"), [("genrate", "did you mean generate?"), ("42", "there are generate, prepare")]
)
def test_an_unknown_command_is_one_line_with_a_proposal(name, hint, capsys):
    assert main([name]) == 2
    message = capsys.readouterr().err
    assert repr(name) in message and hint in message and message.count("\n") == 1


def test_every_command_has_its_entry_points():
    doors = {
        path.stem
        for path in (ROOT / "gpt2fast").glob("*.py")
        if "__main__" in path.read_text(encoding="utf-8") and path.stem != "__main__"
    }
    assert doors - {"__init__"} == set(COMMANDS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"gpt2fast {name}" not in readme] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_terminal(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert not ended.value.code
    text = capsys.readouterr().out
    assert len(text) > 300
    too_long = [line for line in text.splitlines() if len(line) > 80]
    # A command stays in one piece, to be copied.
    assert all(line.startswith(f"  {command_line(name)} ") for line in too_long), too_long


def test_commands_in_a_text_are_what_the_user_would_type(monkeypatch):
    short = "  gpt2fast train --data a\nuse `gpt2fast tune`; cat | gpt2fast prepare -\ngpt2fast 0.1"
    module = short.replace("gpt2fast t", "python -m gpt2fast.t")
    module = module.replace("gpt2fast p", "python -m gpt2fast.p")
    assert as_called(short) == as_called(module) == module
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/gpt2fast", "train"])
    assert as_called(short) == as_called(module) == short


def test_errors_of_the_library_name_commands_as_the_user_calls_them(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/gpt2fast", "train"])
    assert main(["train", "--data", "nowhere.txt", "--out", "never"]) == 1
    assert main(["train", "--out", "never"]) == 2
    assert "python -m" not in capsys.readouterr().err


def test_similar_names_are_proposed():
    known = ["--max-steps", "--max-hours"]
    assert did_you_mean("--max-step", known) == "; did you mean --max-steps?"
    assert did_you_mean("--color", known) == ""


def test_an_unknown_option_is_one_line_with_a_proposal(capsys):
    parser = CommandParser(allow_abbrev=False)
    parser.add_argument("--batch-size")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--batchsize=3"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "did you mean --batch-size?" in message and message.count("\n") == 1


def test_flags_may_be_spelled_with_underscores():
    assert hyphenated("--top_k=a_b") == "--top-k=a_b"
    assert hyphenated("--a_b c_d") == "--a_b c_d"  # a text
    parser = CommandParser()
    parser.add_argument("--batch-size")
    parser.add_argument("rest", nargs="*")
    found = parser.parse_args(["--batch_size", "3", "--", "--a_b"])
    assert (found.batch_size, found.rest) == ("3", ["--a_b"])
