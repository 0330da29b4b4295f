"""Tables of text: their cells, and their lines in a terminal or a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

ABSENT = "–"


def setting(value: Any, digits: int = 6) -> str:
    """A value as YAML spells it, numbers with at most so many digits."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def filled(columns: Mapping[str, Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of a table, without the columns in which every cell is absent."""
    kept = {title: cells for title, cells in columns.items() if set(cells) - {ABSENT}}
    return list(kept), [list(row) for row in zip(*kept.values(), strict=True)]


def table_lines(
    titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: int, rule: bool = False
) -> list[str]:
    """The aligned lines of a table for standard output; they fit its width if it is a terminal.

    Args:
        titles: of the columns.
        rows: their cells.
        left: number of columns, from the first, to align on the left; the others on the right.
        rule: draw a line below the titles.
    """
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    box = Box("    \n" * 2 + " -- \n" + "    \n" * 5, ascii=True)
    table = Table(
        box=box, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )
    if not rule:
        table.box, table.padding = None, (0, 2, 0, 0)
    for place, title in enumerate(titles):
        table.add_column(Text(title), justify="left" if place < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    terminal = sys.stdout is not None and sys.stdout.isatty()
    console = Console(width=None if terminal else 1 << 16)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]
