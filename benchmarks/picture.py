"""Pictures of results, where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2fast._system.files import atomic_write

CAN_DRAW = importlib.util.find_spec("matplotlib") is not None


@contextmanager
def picture(
    file: Path, width: float, height: float, rows: int = 1, columns: int = 1
) -> Iterator[list[Any]]:
    """The axes of a picture, from the top left, in inches; kept as `file` once they are drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height), squeeze=False)
    yield list(axes.flat)
    figure.tight_layout()
    with atomic_write(file) as opened:
        figure.savefig(opened, format="png", dpi=100)
    pyplot.close(figure)
