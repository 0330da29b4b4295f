"""GPT-2, as fast as the hardware allows."""

from .cache import KVCache
from .config import PRESETS, GPT2Config
from .errors import Error
from .generator import Generator
from .model import GPT2, GPT2Output
from .ops.backend import backend
from .tokenizer import Tokenizer

__all__ = [
    "GPT2",
    "PRESETS",
    "Error",
    "GPT2Config",
    "GPT2Output",
    "Generator",
    "KVCache",
    "Tokenizer",
    "backend",
]
__version__ = "0.1.0"
