"""`python -m gpt2fast.evaluate`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt2fast.cli.evaluate import main

TEXT = "Once upon a time there was a king who had a daughter. " * 3


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_a_table_and_json(text: Path, tmp_path: Path, capsys) -> None:
    lambada = tmp_path / "lambada.jsonl"
    lambada.write_text('{"text": "a king"}\n{"text": "a king had a daughter"}\n')
    assert (
        main(
            [
                "--task",
                "perplexity",
                "lambada",
                "--data",
                f"perplexity={text}",
                "--data",
                f"lambada={lambada}",
                "--json",
                str(tmp_path / "scores.json"),
            ]
        )
        == 0
    )
    shown = capsys.readouterr()
    assert "adventures" in shown.err
    assert "token_perplexity" in shown.out and "2 examples" in shown.out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["model"] == "adventures" and scores["weights"] == "float32"
    metrics = scores["tasks"]["perplexity"]["metrics"]
    assert f"{metrics['token_perplexity']['value']:.4f}" in shown.out
    assert scores["tasks"]["lambada"]["examples"] == 2
    used = scores["tasks"]["perplexity"]["settings"]
    assert used == {"context": 256, "stride": 256, "first_token": True}


def test_json_alone_on_standard_output(text: Path, capsys) -> None:
    assert main(["--task", "perplexity", "--data", str(text), "--json", "-", "--limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["limit"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "lamdaba"], "choose from perplexity"),
        (["--task", "lambada", "lambada"], "named twice"),
        (["--task", "lambada", "hellaswag", "--data", "x.txt"], "--data lambada=x.txt"),
        (["--task", "lambada", "--data", "hellaswag=x.txt"], "no --task hellaswag"),
        (["--task", "lambada", "--data", "a", "--data", "b"], "given twice"),
        (["--task", "lambada", "--limit", "0"], "not 1 or more"),
        (["--task", "lambada", "--json", "."], "is a folder"),
        (["--task", "lambada", "--json", "nowhere/x.json"], "nothing can be written in nowhere"),
        (["--task", "perplexity", "--stride", "9", "--context", "8"], "--stride 9"),
        ([], "--task"),
    ],
)
def test_usage_mistakes_cost_a_line(arguments: list[str], words: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "perplexity"], "give the file with --data"),
        (["--task", "perplexity", "--data", "nowhere.txt"], "is no file"),
        (["--task", "perplexity", "--data", "TEXT", "--context", "4096"], "context is 4096"),
        (["--task", "perplexity", "--data", "TEXT", "--model", "./nowhere"], "nowhere"),
        (["--task", "perplexity", "--data", "TEXT", "--device", "warp"], "--device warp"),
    ],
)
def test_mistakes_cost_a_line(
    arguments: list[str], words: str, text: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPT2FAST_DATA", raising=False)
    assert main([str(text) if word == "TEXT" else word for word in arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert words in lines[-1] and lines[-1].startswith("error: ")


def test_help_lists_every_task(capsys) -> None:
    from gpt2fast.evaluation import TASKS

    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in TASKS)


def test_the_pages_first_command_and_example_run(tmp_path: Path, capsys, monkeypatch) -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "evaluation.md").read_text()
    command = page.partition("```sh\ngpt2fast evaluate ")[2].partition("\n")[0]
    monkeypatch.chdir(root)
    assert main([*command.split(), "--limit", "2"]) == 0
    assert "token_perplexity" in capsys.readouterr().out
    example = page.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "evaluation.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip() in ("0.0", "1.0")
