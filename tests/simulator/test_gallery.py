"""Every planted bug is caught, and kernels without one pass every check."""

from __future__ import annotations

from pathlib import Path

import pytest

import gallery

ENOUGH = 20


@pytest.mark.parametrize("order", ["fifo", "lifo", "random"])
@pytest.mark.parametrize("build", gallery.SANITIZERS)
def test_kernels_without_a_bug_pass(galleries: dict[str, Path], build: str, order: str) -> None:
    code, output = gallery.run(galleries[build], "clean", order)
    assert (code, output) == (0, "")


def test_every_planted_bug_is_caught(galleries: dict[str, Path]) -> None:
    caught = gallery.catch_all(galleries)
    assert len(caught) >= ENOUGH
    missed = [name for name, checks in caught.items() if not any(checks.values())]
    assert not missed


def test_the_table_in_the_documentation_names_every_bug(galleries: dict[str, Path]) -> None:
    document = (gallery.ROOT / "docs" / "simulator.md").read_text()
    missing = [n for n in gallery.names(galleries["plain"]) if f"| {n} |" not in document]
    assert not missing, "python tests/simulator/gallery.py rewrites the table"
