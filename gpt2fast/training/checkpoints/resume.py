"""Put a run back to where a checkpoint left it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.run_folder import CHECKPOINTS, OPTIMIZER
from ...data import DataMeta
from ...errors import ConfigError, Error
from ..config import LENGTHS, TrainConfig
from ..start.data import source_of
from ..step import TrainStep
from .folder import best_step
from .position import Position
from .save import data_identity
from .shards import load_tensors
from .state import explain_state, restore_random_states, state_file

_UNCHANGED = (
    *("n_layer", "n_head", "n_embd", "block_size", "init_from", "optimizer"),
    *("moments", "sampling", "lora_rank", "lora_alpha", "lora_targets", "freeze"),
)


def restore(
    checkpoint: Path,
    state: dict[str, Any],
    training: TrainStep,
    meta: DataMeta,
    *,
    own_data: bool,
    steps: int,
) -> Position:
    """Restore the optimizer, the loss scale and the random states.

    Args:
        checkpoint: its folder.
        state: as `load_state` read it.
        training: whose model holds the checkpoint's weights already.
        meta: of the data that the run is to train on.
        own_data: they were prepared by the run itself.
        steps: length of the run.

    Returns:
        The position to go on from.

    Raises:
        ConfigError: the settings or the data are not those that the run began with, or it is over.
        WeightsError: the checkpoint is damaged.
    """
    with _explained_damage(checkpoint):
        for name, kind in (("updates", int), ("random", list), ("position", dict), ("data", dict)):
            if type(state[name]) is not kind:
                raise TypeError(f"{name} is a {type(state[name]).__name__}")
        config, group = training.config, training.group
        before = TrainConfig.from_dict(state["config"], source=str(state_file(checkpoint)))
        _require_unchanged(checkpoint, before, config, own_data)
        for name, value in state["data"].items():
            if value is not None:  # unknown, as nanoGPT's characters were to an older version
                now = data_identity(meta).get(name)
                _require_same(f"the data's {name}", value, now, checkpoint)
        load_tensors(training.optimizer.tensors(), checkpoint / OPTIMIZER, group)
        training.optimizer.resume_after(state["updates"])
        training.scale.load_state_dict(state["scale"])
        position = Position.of(state["position"])
        if position.order > 1:  # the windows go on where they were, whatever the batches
            position.batches = math.ceil(position.batches * before.batch_size / config.batch_size)
        if position.step > steps:
            given = next(name for name in LENGTHS if getattr(config, name) is not None)
            raise ConfigError(
                f"{checkpoint} is at step {position.step}, past the end of this run ({steps} "
                f"steps); raise --{given.replace('_', '-')} to train on"
            )
        if best_step(Path(config.out) / CHECKPOINTS) != position.best_step:
            # The best one so far has been overwritten since, or is in another folder.
            position.best_val_loss, position.best_step = math.inf, -1
        if len(state["random"]) == group.size:
            restore_random_states(state["random"][group.rank])
        else:  # as many streams as processes: new ones, which differ from those before
            torch.manual_seed(config.seed + group.rank + (position.step << 20))
        return position


@contextmanager
def _explained_damage(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except Error:
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise explain_state(state_file(checkpoint) or checkpoint, error) from error


def _require_unchanged(
    checkpoint: Path, before: TrainConfig, now: TrainConfig, own_data: bool
) -> None:
    for name in _UNCHANGED:
        _require_same(name, getattr(before, name), getattr(now, name), checkpoint)
    if own_data:  # made of what the settings named
        asked = source_of(now)
        for name, value in source_of(before).items():
            _require_same(name, value, asked[name], checkpoint)


def _require_same(name: str, saved: Any, asked: Any, checkpoint: Path) -> None:
    if saved != asked:
        raise ConfigError(
            f"cannot resume from {checkpoint}: {name} was {saved!r} there and is {asked!r} now; "
            f"resume with the old value, or start a new run with another --out"
        )
