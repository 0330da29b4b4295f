"""The notebook runs from top to bottom, as its readers run it, and holds no outputs.

Its cells run one after another in one namespace. A kernel would do no more: no cell has a
magic command, and what a cell shows, it prints or plots.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "first_model.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_holds_no_outputs():
    """None can be older than the code; and differences between versions stay readable."""
    for cell in CODE:
        assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]


def test_the_cells_are_plain_python():
    for cell in CODE:
        body = ast.parse("".join(cell["source"])).body  # a magic command would be an error
        last = body[-1]
        shown = isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call)
        assert not shown, f"{cell['id']} ends with an expression, which only a notebook shows"


def test_links_lead_somewhere():
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    targets = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert targets
    for target in targets:
        assert (NOTEBOOK.parent / target).exists(), target


def first_cell() -> str:
    return "".join(CODE[0]["source"])


def test_without_any_text_the_first_cell_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPT2FAST_DATA", raising=False)
    with pytest.raises(SystemExit, match="There is no text here: set TEXT"):
        exec(first_cell(), {})
    assert not list(tmp_path.iterdir())


def test_the_first_cell_takes_a_text_or_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPT2FAST_DATA", raising=False)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "simulator.md").write_text("documentation")
    (tmp_path / "mine.txt").write_text("a text of mine")
    for assignment, text in (("TEXT = None", "documentation"), ('TEXT = "mine.txt"', "a text")):
        exec(first_cell().replace("TEXT = None", assignment), {})
        assert text in capsys.readouterr().out
    monkeypatch.setenv("GPT2FAST_DATA", str(tmp_path))
    (tmp_path / "tinyshakespeare.txt").write_text("First Citizen:")
    exec(first_cell(), {})
    assert (tmp_path / "first_model" / "book.txt").read_text() == "First Citizen:"


@pytest.mark.slow
def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    matplotlib = pytest.importorskip("matplotlib", reason="needs gpt2fast[logs]")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if "GPT2FAST_DATA" not in os.environ:
        monkeypatch.setenv("GPT2FAST_DATA", str(ROOT.parent / "shared" / "data"))
    folder = tmp_path / "notebooks"  # beside what is read where there is no such folder
    folder.mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    monkeypatch.chdir(folder)
    pictures: list[Any] = []
    monkeypatch.setattr(plt, "show", lambda: pictures.append(plt.gcf().get_axes()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    space: dict[str, Any] = {"__name__": "__main__"}
    try:
        for cell in CODE:
            exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
    finally:
        torch.set_num_threads(threads)
        plt.close("all")

    written = capsys.readouterr().out
    curve, maps = pictures
    assert [len(line.get_xdata()) for line in curve[0].get_lines()] == [20, 5, 2]
    assert len(maps) == 4
    rows = space["probabilities"].sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
    # Far better than guessing, and the same by two ways.
    value = space["scored"].metrics["character_perplexity"].value
    assert value < len(set(space["text"])) / 3
    assert abs(torch.tensor(value).log().item() - space["result"].val_loss) < 0.2
    assert f"character_perplexity: {value:.3f}" in written
