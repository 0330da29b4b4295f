"""The report as one HTML file that needs nothing else: no network, no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .curves import AXES, METRICS, colour, has_curve, stroke, svg
from .runs import Run
from .table import all_settings, differences, results

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.settings td { white-space: normal; overflow-wrap: anywhere; max-width: 24rem; }
tr:hover td { background: var(--soft); }
.charts { display: none; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1rem; }
.charts svg { width: 100%; height: auto; }
.key { display: inline-block; width: 1.6rem; margin-right: .5rem; vertical-align: middle; }
.legend span { margin-right: 1.5rem; }
input[type=radio] { margin-left: 1rem; }
"""
_DASHES = {"-": "", "--": "6 3", ":": "2 3", "-.": "6 3 2 3"}


def html(runs: Sequence[Run]) -> str:
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
    title = ("Run: " if len(runs) == 1 else "Runs: ") + ", ".join(run.name for run in runs)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}{show}figure {{ margin: 0; }}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
{_results(runs)}
<h2>Curves</h2>
<p class="legend">{_legend(runs)}</p>
Drawn over: {switch}
{charts}
{_settings(runs)}
</body>
</html>
"""
    return page.encode(errors="replace").decode()  # a file's name may be no Unicode


def _results(runs: Sequence[Run]) -> str:
    titles, rows = results(runs)
    body = [[_key(index) + escape(row[0]), *map(escape, row[1:])] for index, row in enumerate(rows)]
    return _table(titles, body)


def _settings(runs: Sequence[Run]) -> str:
    titles = ["setting", *(run.name for run in runs)]
    parts = []
    if len(runs) > 1:
        rows = [[name, *cells] for name, cells in differences(runs)]
        parts.append("<h2>Settings that differ</h2>\n")
        escaped = [list(map(escape, row)) for row in rows]
        parts.append(_table(titles, escaped, "settings") if rows else "<p>None.</p>\n")
    everything = [[escape(name), *map(escape, cells)] for name, cells in all_settings(runs)]
    if everything:
        parts.append("<details><summary>All settings</summary>\n")
        parts.append(_table(titles, everything, "settings") + "</details>\n")
    return "".join(parts)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Titles as they are, cells as HTML."""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<div class="wide {kind}"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def _legend(runs: Sequence[Run]) -> str:
    return "".join(
        f"<span>{_key(index)}{escape(run.name)}</span> " for index, run in enumerate(runs)
    )


def _key(index: int) -> str:
    """A piece of the run's line."""
    return (
        '<svg class="key" viewBox="0 0 26 6" aria-hidden="true"><line x1="0" y1="3" x2="26" y2="3" '
        f'stroke="{colour(index)}" stroke-width="3" '
        f'stroke-dasharray="{_DASHES[stroke(index)]}"/></svg>'
    )
