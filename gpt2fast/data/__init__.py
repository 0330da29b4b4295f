"""Text to tokens (`prepare_data`), and tokens to batches (`TokenDataset`, `DataModule`)."""

from __future__ import annotations

from .dataset import DataModule, TokenDataset
from .meta import DataMeta
from .prepare import PreparedData, prepare_data

__all__ = ["DataMeta", "DataModule", "PreparedData", "TokenDataset", "prepare_data"]
