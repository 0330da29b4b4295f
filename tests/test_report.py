"""`python -m gpt2fast.report`: comparing runs by their folders."""

from __future__ import annotations

import io
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpt2fast.cli import report
from gpt2fast.errors import DataError
from gpt2fast.reporting.comparison import differences, results
from gpt2fast.reporting.curves import points
from gpt2fast.training import TrainConfig
from gpt2fast.training.logs.log import RunLog
from gpt2fast.training.logs.runs import LoggedRun, read_runs

VOID = {"meta", "input", "br", "hr", "link", "img"}


def make_run(folder: Path, losses: list[float], **settings: Any) -> Path:
    """A folder as training leaves it; a validation with every second row."""
    folder.mkdir(parents=True)
    config = TrainConfig(out=str(folder), **settings)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    log = RunLog(folder / "log.csv")
    for number, loss in enumerate(losses):
        row = {"step": 10 * number, "tokens": 640 * number, "elapsed_seconds": 36.0 * number}
        row |= {"train_loss": loss, "lr": 1e-3, "grad_norm": 1.5, "tokens_per_second": 1000.0}
        log.write({**row, "val_loss": loss + 0.5 if number % 2 == 0 else None})
    log.close()
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path / "slow", [5.0, 4.0, 3.5, 3.25, 3.0], lr=1e-4),
        make_run(tmp_path / "fast", [5.0, 3.0, 2.0, 2.5, 2.25], lr=1e-3),
    ]


class Page(HTMLParser):
    """Checks that elements are closed in order; keeps text, elements and their attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folders: list[Path], tmp_path: Path, *options: str) -> Page:
    pytest.importorskip("matplotlib")
    out = tmp_path / "page.html"
    assert report.main([*map(str, folders), "--out", str(out), *options]) == 0
    return Page(out.read_text(encoding="utf-8"))


def test_the_table_says_how_the_runs_ended(two):
    (two[1] / "model.safetensors").touch()
    titles, rows = results(read_runs(two))
    slow, fast = (dict(zip(titles, row, strict=True)) for row in rows)
    assert slow["run"] == "slow" and slow["state"] == "not finished"
    assert fast["state"] == "finished" and fast["steps"] == "40" and fast["tokens"] == "2,560"
    assert fast["training loss"] == "2.2500" and fast["validation loss"] == "2.7500"
    assert fast["best validation"] == "2.5000 at 20"
    assert fast["time"] == "0:02:24" and fast["tok/s, median"] == "1,000"
    assert "memory, GiB" not in titles and "not finite" not in titles  # nothing to say


def test_the_settings_that_differ_are_named(two):
    assert differences(read_runs(two)) == [("lr", ["0.0001", "0.001"])]


def test_the_page_holds_curves_and_tables_and_fetches_nothing(two, tmp_path, capsys):
    page = page_of(two, tmp_path)
    tags = [tag for tag, _ in page.elements]
    charts = [a for tag, a in page.elements if tag == "svg" and "aria-label" in a]
    assert len(charts) == 15  # five values, over steps, tokens and hours
    assert not {"script", "link", "img", "iframe", "object"} & set(tags)
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert name not in ("src", "onload") and not (value or "").startswith("//")
            if name in ("href", "xlink:href"):
                assert (value or "").startswith("#")
    style = (tmp_path / "page.html").read_text()
    assert "@import" not in style and re.findall(r"url\((?!#)", style) == []
    for text in ("slow", "fast", "2.5000 at 20", "Settings that differ", "0.0001"):
        assert text in page.text
    shown = capsys.readouterr().out
    assert "best validation" in shown and str(tmp_path / "page.html") in shown


def test_no_label_is_cut_off_at_the_edge_of_its_chart(two, tmp_path):
    page_of(two, tmp_path)
    source = (tmp_path / "page.html").read_text()
    charts = re.findall(
        r'<svg[^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*aria-label.*?</svg>', source, re.S
    )
    drawn = re.findall(r"<svg[^>]*aria-label.*?</svg>", source, re.S)
    assert len(charts) == len(drawn) == 15
    for (width, height), chart in zip(charts, drawn, strict=True):
        labels = re.findall(
            r'<text [^>]*?font-size: ([\d.]+)px[^>]*? x="([\d.]+)" y="([\d.]+)"', chart
        )
        assert labels
        for size, x, y in labels:
            assert 0 < float(x) < float(width)
            # Letters reach up to their size above the line that they stand on, and a third below.
            assert 0.7 * float(size) < float(y) < float(height) - 0.3 * float(size)


def test_names_in_the_page_are_unique_and_refer_to_something(two, tmp_path):
    page = page_of(two, tmp_path)
    names = [a["id"] for _, a in page.elements if "id" in a]
    assert len(names) == len(set(names))
    source = (tmp_path / "page.html").read_text()
    referred = set(re.findall(r'(?:url\(|href=")#([^)"]+)', source))
    assert referred and referred <= set(names)


def test_the_page_is_readable_in_light_and_dark(two, tmp_path):
    page = page_of(two, tmp_path)
    source = (tmp_path / "page.html").read_text()
    assert "color-scheme: light dark" in source and "currentColor" in source
    # What matplotlib draws is in the page's own color, or in those of the runs.
    drawn = {
        color
        for _, attributes in page.elements
        for color in re.findall(r"#[0-9a-f]{6}\b", attributes.get("style") or "")
    }
    assert drawn == {"#3b7dd8", "#e07b39"}


def test_the_axis_is_switched_without_scripts(two, tmp_path):
    page = page_of(two, tmp_path)
    radios = [a for tag, a in page.elements if tag == "input"]
    assert [a["id"] for a in radios] == ["by-step", "by-tokens", "by-hours"]
    assert ["checked" in a for a in radios] == [True, False, False]
    source = (tmp_path / "page.html").read_text()
    for axis in ("step", "tokens", "hours"):
        assert f"#by-{axis}:checked ~ .{axis} {{ display: grid; }}" in source


def test_points_over_steps_tokens_and_hours(two):
    (run, _) = read_runs(two)
    assert points(run, "train_loss", "step") == ([0, 10, 20, 30, 40], [5, 4, 3.5, 3.25, 3])
    assert points(run, "val_loss", "tokens") == ([0, 1280, 2560], [5.5, 4.0, 3.5])
    assert points(run, "lr", "hours")[0] == pytest.approx([0, 0.01, 0.02, 0.03, 0.04])


def test_a_long_curve_is_averaged_down():
    rows = [{"step": step, "train_loss": float(step % 2)} for step in range(4000)]
    xs, ys = points(LoggedRun("a", Path("a"), rows, {}, False), "train_loss", "step")
    assert len(xs) == 1334 and xs[0] == 1 and min(xs) >= 0 and max(xs) <= 3999
    assert set(ys) == {1 / 3, 2 / 3, 1.0}  # the last point stands for one row


def test_a_picture_is_written(two, tmp_path):
    page_of(two, tmp_path, "--png", str(tmp_path / "curves.png"), "--axis", "hours")
    from PIL import Image

    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width == 1320
        colors = {c for _, c in picture.convert("RGB").getcolors(1 << 24)}
    assert {(0x3B, 0x7D, 0xD8), (0xE0, 0x7B, 0x39)} <= colors  # both runs were drawn


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "a$b$_c", '"x" & y', "_hidden", "Ω好"]
)
def test_any_name_is_shown_as_it_is(tmp_path, name):
    if "/" in name:
        name = name.replace("/", "∕")
    folder = make_run(tmp_path / name, [3.0, 2.0], sample_prompt="</td><script>")
    page = page_of([folder], tmp_path, "--png", str(tmp_path / "curves.png"))
    assert name in page.text and "</td><script>" in page.text
    assert not any(tag == "script" for tag, _ in page.elements)


@pytest.mark.skipif(sys.platform != "linux", reason="names there are Unicode")
def test_a_name_that_is_no_unicode(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "a", [3.0, 2.0]).rename(tmp_path / "a\udcff")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert "a?" in page_of([folder], tmp_path).text


def test_names_that_collide_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / way / "run", [3.0, 2.0]) for way in ("one", "two", "one/run/x")]
    runs = read_runs([*folders, tmp_path / "one" / "." / "run"])  # one of them twice
    assert [run.name for run in runs] == ["one/run", "two/run", "x/run"]


def test_one_row_is_a_point(tmp_path):
    page = page_of([make_run(tmp_path / "a", [3.0])], tmp_path)
    assert "3.0000" in page.text


def test_a_run_that_still_goes_is_shown_with_the_others(two, tmp_path):
    with (two[0] / "log.csv").open("a") as file:
        file.write("50,3200,2.")  # a row that is being written
    started = tmp_path / "started"
    started.mkdir()
    (started / "log.csv").write_text("step,tokens\n")
    runs = read_runs([*two, started])
    assert [len(run.rows) for run in runs] == [5, 5, 0]
    page = page_of([*two, started], tmp_path)
    assert "nothing logged yet" in page.text


def test_rows_that_are_not_finite_are_left_out_and_counted(tmp_path):
    folder = make_run(tmp_path / "a", [3.0, math.nan, math.inf, 2.0, 1.0])
    (run,) = read_runs([folder])
    assert points(run, "train_loss", "step") == ([0, 30, 40], [3, 2, 1])
    page = page_of([folder], tmp_path)
    assert "2 rows, first at step 10" in page.text


def test_an_old_log_and_a_missing_or_broken_config(tmp_path):
    for name, config in [("a", None), ("b", "- [}"), ("c", "just text"), ("d", "\0")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.csv").write_text("step,train_loss\n10,3.5\n20,3.25\n")
        if config is not None:
            (tmp_path / name / "config.yaml").write_text(config)
    folders = [tmp_path / name for name in "abcd"]
    assert all(run.settings == {} for run in read_runs(folders))
    page = page_of(folders, tmp_path)
    assert "3.2500" in page.text
    assert [a["id"] for tag, a in page.elements if tag == "input"] == ["by-step"]


def test_a_log_in_json_alone_is_read(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "train_loss": 2.5, "val_loss": null}\n{"st')
    (run,) = read_runs([tmp_path])
    assert run.last("train_loss") == 2.5 and run.last("val_loss") is None


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist; name the folder of a run"),
        (lambda path: path.touch(), "is a file; name the folder of a run"),
        (lambda path: path.mkdir(), "has neither log.csv nor log.jsonl; name the folder"),
        (lambda path: make_run(path / "inner", [1.0]), "its folders inner do"),
        (lambda path: make_run(path, []), "no row has been logged yet"),
    ],
    ids=["missing", "file", "empty", "parent", "no rows"],
)
def test_what_is_not_a_run_is_one_line(tmp_path, capsys, make, message):
    make(tmp_path / "run")
    out = tmp_path / "page.html"
    assert report.main([str(tmp_path / "run"), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not out.exists()


def test_a_log_of_bytes_is_a_log_without_rows(tmp_path):
    (tmp_path / "log.csv").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(DataError, match="no row has been logged"):
        read_runs([tmp_path])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "run/log.csv"], "--out is 'run/log.csv'; it must end in .html or .htm"),
        (["--png", "picture.jpg"], "--png is 'picture.jpg'; it must end in .png"),
        (["--out", "nowhere/page.html"], "there is no folder 'nowhere'"),
        (["--axis", "miles"], "invalid choice: 'miles'"),
    ],
)
def test_a_wrong_option_is_one_line(two, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = report.main(["slow", *options])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_without_matplotlib_one_line_says_what_to_install(two, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(two[0]), "--out", str(tmp_path / "page.html")]) == 2
    assert 'pip install "gpt2fast[logs]"' in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_page(two, tmp_path, monkeypatch, capsys):
    import os

    out = tmp_path / "page.html"
    out.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert report.main([str(two[0]), "--out", str(out)]) == 1
    assert "No space left" in capsys.readouterr().err and out.read_text() == "old"
    assert not list(tmp_path.glob(".page*"))
