"""Text to tokens (`prepare_data`), and tokens to batches (`TokenDataset`, `DataModule`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataset import TokenDataset
    from .meta import DataMeta
    from .module import DataModule
    from .prepare import PreparedData, prepare_data

__all__ = ["DataMeta", "DataModule", "PreparedData", "TokenDataset", "prepare_data"]

_HOMES = {
    "DataMeta": "meta",
    "DataModule": "module",
    "PreparedData": "prepare",
    "TokenDataset": "dataset",
    "prepare_data": "prepare",
}


def __getattr__(name: str) -> Any:
    # Preparing needs no torch, and its worker processes should not wait for it.
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
