"""The report on training runs: their curves, results and settings on one page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..training.logs.runs import LoggedRun
from .comparison import all_settings, differences, results
from .curves import AXES, METRICS, color, has_curve, stroke, svg
from .page import html_page, html_table

_STYLE = """
.settings td { overflow-wrap: anywhere; max-width: 24rem; }
.charts { display: none; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; }
.charts svg { width: 100%; height: auto; }
.key { display: inline-block; width: 1.6rem; margin-right: .5rem; vertical-align: middle; }
.legend span { margin-right: 1.5rem; }
input[type=radio] { margin-left: 1rem; }
"""
_DASHES = {"-": "", "--": "6 3", ":": "2 3", "-.": "6 3 2 3"}


def runs_page(runs: Sequence[LoggedRun]) -> str:
    """The page, with the charts by step, by tokens and by hours, and the tables."""
    chosen = [axis for axis in AXES if any(has_curve(runs, metric, axis) for metric in METRICS)]
    show = "".join(f"#by-{axis}:checked ~ .{axis} {{ display: grid; }}\n" for axis in chosen)
    switch = "".join(
        f'<input type="radio" name="axis" id="by-{axis}"{" checked" if place == 0 else ""}>'
        f'<label for="by-{axis}"> {AXES[axis]}</label>\n'
        for place, axis in enumerate(chosen)
    )
    charts = "".join(
        f'<div class="charts {axis}">\n'
        + "".join(
            f"<figure>{svg(runs, metric, axis)}</figure>\n"
            for metric in METRICS
            if has_curve(runs, metric, axis)
        )
        + "</div>\n"
        for axis in chosen
    )
    keys = [_key(index) for index in range(len(runs))]
    legend = "".join(
        f"<span>{key}{escape(run.name)}</span> " for key, run in zip(keys, runs, strict=True)
    )
    title = ("Run: " if len(runs) == 1 else "Runs: ") + ", ".join(run.name for run in runs)
    body = f"""{html_table(*results(runs), "numbers", keys)}
<h2>Curves</h2>
<p class="legend">{legend}</p>
Drawn over: {switch}
{charts}
{_settings(runs)}"""
    return html_page(title, body, _STYLE + show)


def _settings(runs: Sequence[LoggedRun]) -> str:
    titles = ["setting", *(run.name for run in runs)]
    parts = []
    if len(runs) > 1:
        rows = [[name, *cells] for name, cells in differences(runs)]
        parts.append("<h2>Settings that differ</h2>\n")
        parts.append(html_table(titles, rows, "settings") if rows else "<p>None.</p>\n")
    everything = [[name, *cells] for name, cells in all_settings(runs)]
    if everything:
        parts.append("<details><summary>All settings</summary>\n")
        parts.append(html_table(titles, everything, "settings") + "</details>\n")
    return "".join(parts)


def _key(index: int) -> str:
    """A piece of the run's line."""
    return (
        '<svg class="key" viewBox="0 0 26 6" aria-hidden="true"><line x1="0" y1="3" x2="26" y2="3" '
        f'stroke="{color(index)}" stroke-width="3" '
        f'stroke-dasharray="{_DASHES[stroke(index)]}"/></svg>'
    )
