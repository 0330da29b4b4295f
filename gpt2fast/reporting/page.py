"""One HTML file that needs nothing else: no network, no scripts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
figure { margin: 0; }
img { max-width: 100%; height: auto; background: white; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid var(--line); }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right;
  white-space: nowrap; }
tr:hover td { background: var(--soft); }
"""


def html_page(title: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: of the page, and its heading.
        body: HTML below the heading.
        style: CSS beside that of all pages.
    """
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""
    return page.encode(errors="replace").decode()  # a file's name may not be Unicode


def html_table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "", keys: Sequence[str] = ()
) -> str:
    """A table of text that scrolls sideways where it is too wide.

    Args:
        titles: of the columns.
        rows: their cells.
        kind: its CSS class.
        keys: HTML before the first cell of each row.
    """
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    keys = keys or [""] * len(rows)
    body = "".join(
        f"<tr><td>{key}" + "</td><td>".join(map(escape, row)) + "</td></tr>\n"
        for key, row in zip(keys, rows, strict=True)
    )
    return (
        f'<div class="wide {kind}"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def html_image(png: bytes, title: str) -> str:
    """A picture inside the page."""
    coded = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{coded}" alt="{escape(title)}">'
