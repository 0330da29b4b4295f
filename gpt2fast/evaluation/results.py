"""Results as a table for people and as an object for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._system.tables import table_lines
from .published import SIZES
from .run import Result
from .task import Metric


def as_table(results: Sequence[Result], size: int | None) -> str:
    """A table with a metric a line, for a published model beside its paper's figures; remarks.

    Args:
        results: of tasks.
        size: which of the published models it is; `published_size` tells.
    """
    titles = ["task", "metric", "value", "±"]
    if size is not None:
        titles.append(f"GPT-2 paper, {list(SIZES.values())[size]}")
    rows = []
    for result in results:
        for name, metric in result.metrics.items():
            values = [metric.value, metric.stderr]
            if size is not None:
                values.append(result.task.published.get(name, (None,) * len(SIZES))[size])
            cells = ["" if value is None else _shown(name, value) for value in values]
            rows.append([result.task.name, name, *cells])
    lines = table_lines(titles, rows, left=2, rule=True)
    for result in results:
        lines.append(
            f"{result.task.name}: {result.examples:,} example{'s' * (result.examples != 1)} from "
            f"{result.data}, {result.seconds:.1f} s"
        )
        lines += [f"{result.task.name}: {remark}" for remark in result.remarks]
    if size is not None:
        lines += [
            f"{result.task.name} and the paper: {result.task.difference}"
            for result in results
            if result.task.difference
        ]
    return "\n".join(lines)


def as_object(results: Sequence[Result], size: int | None) -> dict[str, Any]:
    """The same by task, for JSON; accuracies are fractions."""
    return {
        result.task.name: {
            "data": result.data,
            "examples": result.examples,
            "seconds": result.seconds,
            "settings": result.settings,
            "remarks": list(result.remarks),
            "metrics": {
                name: _metric(result, name, metric, size) for name, metric in result.metrics.items()
            },
        }
        for result in results
    }


def _metric(result: Result, name: str, metric: Metric, size: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {"value": metric.value, "stderr": metric.stderr}
    if size is not None and name in result.task.published:
        found["paper"] = result.task.published[name][size]
    return found


def _shown(name: str, value: float) -> str:
    if name.startswith("acc"):
        return f"{100 * value:.2f} %"
    return f"{value:.4f}" if value < 1e6 else f"{value:.4g}"
