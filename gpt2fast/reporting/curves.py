"""The curves of several runs, drawn by matplotlib."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .._system.files import atomic_write
from ..errors import ConfigError, DataError
from ..training.logs.runs import LoggedRun, is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = {
    "train_loss": "training loss, nats per token",
    "val_loss": "validation loss, nats per token",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
AXES = {"step": "step", "tokens": "tokens", "hours": "hours"}
"""Columns that curves can be drawn over, and their titles."""

COLORS = (
    "#3b7dd8", "#e07b39", "#3a9d5d", "#c8473f", "#8a63c9",
    "#a5673f", "#d06aa8", "#7f8c2d", "#2aa3ad", "#7c7c88",
)  # fmt: skip
"""Readable on white and on black; then again with other strokes."""
_STROKES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
_INK = "#010203"
"""Stands for the page's own text color."""
_MOST_POINTS = 1500


def color(index: int) -> str:
    """The color of run number `index`."""
    return COLORS[index % len(COLORS)]


def stroke(index: int) -> Literal["-", "--", ":", "-."]:
    """The line style of run number `index`, as matplotlib spells it."""
    return _STROKES[index // len(COLORS) % len(_STROKES)]


def points(run: LoggedRun, metric: str, axis: str) -> tuple[list[float], list[float]]:
    """The finite values of a curve; a long one is averaged down to at most 1,500 points."""
    found = []
    for row in run.rows:
        x, y = row.get("elapsed_seconds" if axis == "hours" else axis), row.get(metric)
        if is_number(x) and is_number(y):
            found.append((x / 3600 if axis == "hours" else x, y))
    group = -(-len(found) // _MOST_POINTS) or 1
    parts = [found[i : i + group] for i in range(0, len(found), group)]
    xs = [sum(x for x, _ in part) / len(part) for part in parts]
    ys = [sum(y for _, y in part) / len(part) for part in parts]
    return xs, ys


def svg(runs: Sequence[LoggedRun], metric: str, axis: str) -> str:
    """One chart as an <svg> element for a page that says which color is which run."""
    with _matplotlib() as figure_of:
        figure = figure_of(figsize=(6.4, 3.4), layout="constrained")
        _draw(figure.add_subplot(), runs, metric, axis)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    head, drawing = text[text.index("<svg") :].split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)  # the page says how large it is
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = drawing.replace(_INK, "currentColor")
    # Names must be unique in the page.
    prefix = f"{axis}-{metric}-"
    drawing = re.sub(r'\bid="', f'id="{prefix}', drawing)
    drawing = drawing.replace("url(#", f"url(#{prefix}").replace('href="#', f'href="#{prefix}')
    return f'{head} role="img" aria-label="{METRICS[metric]}">{drawing}'


def write_png(runs: Sequence[LoggedRun], path: Path, axis: str = "step") -> None:
    """Every chart that has a curve, in one picture."""
    shown = [metric for metric in METRICS if has_curve(runs, metric, axis)]
    if not shown:
        raise DataError(f"no row says how many {axis} it stands for; draw over steps instead")
    with _matplotlib() as figure_of:
        height = 2.9 * -(-len(shown) // 2)
        figure = figure_of(figsize=(11, height + 0.3 * len(runs) / 2), layout="constrained")
        figure.set_facecolor("white")
        for place, metric in enumerate(shown):
            axes = figure.add_subplot(-(-len(shown) // 2), 2, place + 1)
            _draw(axes, runs, metric, axis)
        lines = _legend_lines(runs)
        # A label that begins with an underscore would be left out.
        names = [f" {run.name}" if run.name.startswith("_") else run.name for run in runs]
        legend = figure.legend(lines, names, loc="outside lower center", ncols=2, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
    with atomic_write(path) as file:
        file.write(picture.getvalue())


def has_curve(runs: Sequence[LoggedRun], metric: str, axis: str) -> bool:
    """True if any run has a value to draw."""
    return any(points(run, metric, axis)[0] for run in runs)


def _draw(axes: Axes, runs: Sequence[LoggedRun], metric: str, axis: str) -> None:
    least, most = math.inf, -math.inf
    for index, run in enumerate(runs):
        xs, ys = points(run, metric, axis)
        least, most = min([least, *ys]), max([most, *ys])
        # A dot shows where there are too few values for a line.
        marker = "o" if len(xs) <= 30 else ""
        axes.plot(
            xs, ys, color=color(index), linestyle=stroke(index), marker=marker, markersize=3,
            linewidth=1.4,
        )  # fmt: skip
    axes.set_title(METRICS[metric], fontsize=10, loc="left")
    axes.set_xlabel(AXES[axis])
    axes.grid(alpha=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    if metric == "grad_norm" and 0 < least < most / 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")


def _legend_lines(runs: Sequence[LoggedRun]) -> list[Any]:
    from matplotlib.lines import Line2D

    return [Line2D([], [], color=color(i), linestyle=stroke(i)) for i in range(len(runs))]


@contextmanager
def _matplotlib() -> Iterator[Any]:
    """The class Figure, under settings of our own. No window system is needed for it."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            'a report needs matplotlib, which is not installed: pip install "gpt2fast[logs]"'
        ) from error
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: dict[Any, Any] = {
        **dict.fromkeys(inked, _INK),
        "svg.fonttype": "none",
        "svg.hashsalt": "gpt2fast",
        "font.size": 9,
        "grid.color": _INK,
    }
    with warnings.catch_warnings(), matplotlib.rc_context(settings):
        # A name may have letters that the font lacks.
        warnings.filterwarnings("ignore", message=".*Glyph.*missing from")
        yield Figure
