"""Training: configuration, loop, schedule, optimizer, checkpoints."""

from .checkpoints.position import TrainResult
from .config import TrainConfig
from .failures import TrainingError
from .loop import train
from .stopping import Interrupted

__all__ = ["Interrupted", "TrainConfig", "TrainResult", "TrainingError", "train"]
