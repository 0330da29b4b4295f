"""Training: configuration, loop, schedule, optimizer, checkpoints."""

from .config import TrainConfig
from .loop import TrainingError, TrainResult, train
from .stopping import Interrupted

__all__ = ["Interrupted", "TrainConfig", "TrainResult", "TrainingError", "train"]
