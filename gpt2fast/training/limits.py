"""When a run is over: its steps are done, its time is up, its loss is good enough or stays."""

from __future__ import annotations

from .checkpoints.position import Position
from .config import TrainConfig


def out_of_time(config: TrainConfig, position: Position, steps: int, elapsed: float) -> str | None:
    """Why a run ends after `elapsed` seconds, if it does; `steps` is its length."""
    if position.step >= steps:
        return "done"
    if position.step and config.max_hours is not None and elapsed >= config.max_hours * 3600:
        return f"stopped after {config.max_hours:g} hours (--max-hours)"
    return None


def good_enough(config: TrainConfig, position: Position) -> str | None:
    """Why a run ends after the validation of this step, if it does."""
    if not position.step or position.evaluated != position.step:
        return None
    if config.target_loss is not None and position.val_loss <= config.target_loss:
        return f"stopped at a validation loss of {position.val_loss:.4f} (--target-loss)"
    if config.early_stopping is not None and position.without_best >= config.early_stopping:
        return (
            f"stopped after {position.without_best} validations without a new lowest loss "
            "(--early-stopping)"
        )
    return None
