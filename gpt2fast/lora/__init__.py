"""Low-rank adapters: fine-tuning that changes a fraction of a per cent of the weights."""

from ..nn.projection import merge
from .adapters import LoRAProjection, add_adapters, is_adapted
from .storage import load_adapter, save_adapter

__all__ = [
    "LoRAProjection",
    "add_adapters",
    "is_adapted",
    "load_adapter",
    "merge",
    "save_adapter",
]
