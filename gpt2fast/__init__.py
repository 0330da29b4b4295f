"""GPT-2, as fast as the hardware allows."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._system.openmp import spin_briefly_if_busy, survive_forks

if TYPE_CHECKING:
    from .config import PRESETS, GPT2Config
    from .errors import Error
    from .hf import fuse, unfuse
    from .inference.generator import Generator
    from .inference.grammar import Grammar
    from .model import GPT2, GPT2Output
    from .nn.kv_cache import KVCache
    from .ops.backend import backend
    from .tokenizer import Tokenizer

__all__ = [
    "GPT2",
    "PRESETS",
    "Error",
    "GPT2Config",
    "GPT2Output",
    "Generator",
    "Grammar",
    "KVCache",
    "Tokenizer",
    "backend",
    "fuse",
    "unfuse",
]
__version__ = "0.1.0"

_HOMES = {
    "GPT2": "model",
    "GPT2Config": "config",
    "GPT2Output": "model",
    "Generator": "inference.generator",
    "Grammar": "inference.grammar",
    "KVCache": "nn.kv_cache",
    "PRESETS": "config",
    "Error": "errors",
    "Tokenizer": "tokenizer",
    "backend": "ops.backend",
    "fuse": "hf",
    "unfuse": "hf",
}

spin_briefly_if_busy()
survive_forks()

_ROOMS = (
    *("data", "doctor", "evaluation", "generate", "hf", "lora"),
    *("nn", "ops", "quantization", "training", "tuning"),
)


def __getattr__(name: str) -> Any:
    # Loaded when first used: a command line then answers --help at once, and can be interrupted
    # in the seconds that importing torch takes.
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
