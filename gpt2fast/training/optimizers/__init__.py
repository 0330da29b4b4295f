"""The optimizers of a run: the registry, our AdamW, and a model's parameters shared among them."""

from .adamw import AdamW
from .model_optimizer import ModelOptimizer
from .registry import OPTIMIZERS

__all__ = ["OPTIMIZERS", "AdamW", "ModelOptimizer"]
