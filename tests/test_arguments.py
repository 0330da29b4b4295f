"""What every command line has in common."""

from __future__ import annotations

import re

import pytest

from gpt2fast.__main__ import _COMMANDS
from gpt2fast.cli.arguments import OneLineParser
from gpt2fast.errors import did_you_mean

MODULES = re.findall(r"^python -m (gpt2fast\.\w+)", _COMMANDS, re.MULTILINE)


@pytest.mark.parametrize("module", MODULES)
def test_help_fits_a_terminal(module, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    main = pytest.importorskip(module).main
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert not ended.value.code
    text = capsys.readouterr().out
    assert len(text) > 300
    too_long = [line for line in text.splitlines() if len(line) > 80]
    # A command stays in one piece, to be copied.
    assert all(line.startswith("  python -m ") for line in too_long), too_long


def test_similar_names_are_proposed():
    known = ["--max-steps", "--max-hours"]
    assert did_you_mean("--max-step", known) == "; did you mean --max-steps?"
    assert did_you_mean("--colour", known) == ""


def test_an_unknown_option_is_one_line_with_a_proposal(capsys):
    parser = OneLineParser(allow_abbrev=False)
    parser.add_argument("--batch-size")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--batchsize=3"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "did you mean --batch-size?" in message and message.count("\n") == 1
