"""Methods of a model that hand a call to a room above it.

A model's file imports nothing from above, so that it can be read and used alone. Where it is
convenient that a method does more (`model.generate`), that is one line: `above("room.file")` and a
call. docs/architecture.md lists all of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def above(module: str) -> Any:
    """A module of gpt2fast by its name, imported now."""
    return import_module(f"gpt2fast.{module}")
