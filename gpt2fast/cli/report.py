"""Compare training runs: `gpt2fast report runs/a runs/b`.

Writes one HTML file with curves and tables, and on request a picture of the curves. Runs that still
go, and runs that never ended, can be looked at as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .._system.output import say
from ..errors import ConfigError
from .arguments import CommandParser
from .command import command


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="FOLDER", help="of a run, with its log.csv")
    parser.add_argument("--out", default="report.html", help="the page (default: %(default)s)")
    parser.add_argument("--png", metavar="FILE.png", help="a picture of the curves as well")
    parser.add_argument(
        "--axis", choices=("step", "tokens", "hours"), default="step",
        help="what the picture's curves are drawn over (default: %(default)s)",
    )  # fmt: skip
    return parser


@command(mistakes=(ConfigError,))
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(argv)
    _check_target("--out", options.out, (".html", ".htm"))
    if options.png is not None:
        _check_target("--png", options.png, (".png",))
    _report(options.runs, Path(options.out), options.png, options.axis)
    return 0


def _check_target(flag: str, name: str, endings: tuple[str, ...]) -> None:
    """A slip of the hand must not replace a log or a checkpoint."""
    path = Path(name)
    if path.suffix.lower() not in endings:
        raise ConfigError(f"{flag} is {name!r}; it must end in {' or '.join(endings)}")
    if path.is_dir():
        raise ConfigError(f"{flag} is {name!r}, which is a folder; name a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{flag} is {name!r}, but there is no folder {str(path.parent)!r}")


def _report(folders: Sequence[str], out: Path, png: str | None, axis: str) -> None:
    from .._system.files import atomic_write_text
    from .._system.tables import table_lines
    from ..reporting.comparison import results
    from ..reporting.curves import write_png
    from ..reporting.report import runs_page
    from ..training.logs.runs import read_runs

    runs = read_runs(folders)
    atomic_write_text(out, runs_page(runs))
    titles, rows = results(runs)
    # Columns become lines: a run each would be too wide.
    head, *body = zip(titles, *rows, strict=True)
    for line in table_lines(head, body, left=1):
        say(line)
    say(f"\n{out}")
    if png is not None:
        write_png(runs, Path(png), axis)
        say(png)
