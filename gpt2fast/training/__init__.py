"""Training: configuration, loop, schedule, optimizer, checkpoints."""

from .config import TrainConfig
from .interrupt import Interrupted
from .loop import TrainingError, TrainResult, train

__all__ = ["Interrupted", "TrainConfig", "TrainResult", "TrainingError", "train"]
