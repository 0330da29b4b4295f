"""Write checkpoints: a loadable model folder and what it takes to continue the run bit for bit.

A folder is written beside its place and renamed into it, and renamed before it is deleted, so a
name in checkpoints/ is always a whole checkpoint. Any number of processes can read what any other
number has written.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._system.files import sync_directory
from ...data.meta import DataMeta
from ...errors import WeightsError
from ...lora import merge
from ...model import GPT2
from ...run_folder import OPTIMIZER, STATE
from ...tokenizer import Tokenizer
from ..config import TrainConfig
from ..distributed import Group
from ..start.adapters import adapter_state, save_adapter_beside
from ..start.data import located
from ..step import TrainStep
from .folder import displaced
from .position import Position
from .shards import save_tensors
from .state import FORMAT, random_states, write_state


class Saver:
    """Writes the files of one run; every process calls it, the main one writes what is whole."""

    def __init__(
        self, config: TrainConfig, meta: DataMeta, tokenizer: Tokenizer | None, group: Group
    ) -> None:
        self.config, self.meta, self.tokenizer, self.group = config, meta, tokenizer, group

    def save(self, directory: Path, training: TrainStep, position: Position) -> None:
        """Write a checkpoint of this moment as `directory`."""
        model, optimizer = training.model, training.optimizer
        state = {
            "config": {**self.config.to_dict(), **located(self.config)},
            "data": data_identity(self.meta),
            "position": dataclasses.asdict(position),
            "updates": optimizer.updates,
            "scale": training.scale.state_dict(),
            "adapters": adapter_state(model),
            "random": self.group.gathered(random_states()),
        }
        weights = self.group.whole_state(model)

        def save_whole(folder: Path) -> None:
            _save_model(self.whole(model, weights), folder, self.tokenizer)
            save_adapter_beside(model, folder, self.config)

        _save_checkpoint(directory, save_whole, state, optimizer.tensors(), self.group)

    def export_model(self, model: GPT2) -> None:
        """Write the finished model into the run folder, adapters merged and by themselves."""
        weights = self.group.whole_state(model)
        out = Path(self.config.out)

        def write() -> None:
            finished = merge(self.whole(model, weights))
            finished.to(getattr(torch, self.config.save_dtype))
            _save_model(finished, out, self.tokenizer)
            save_adapter_beside(model, out, self.config)

        self.group.on_main(write)

    def whole(self, model: GPT2, weights: dict[str, Tensor]) -> GPT2:
        """The model itself, or where its weights are shards, one that holds `weights`."""
        if self.group.size == 1 or self.config.parallel != "fsdp":
            return model
        whole = GPT2(model.config, device="meta")
        whole.load_state_dict(weights, assign=True)
        return whole


def data_identity(meta: DataMeta) -> dict[str, Any]:
    """The values by which prepared data sets differ."""
    names = ("tokenizer_fingerprint", "vocab_size", "train_tokens", "val_tokens")
    return {name: getattr(meta, name) for name in names}


def _save_checkpoint(
    directory: Path,
    save_whole: Callable[[Path], None],
    state: dict[str, Any],
    optimizer: dict[str, Tensor],
    group: Group,
) -> None:
    """Write a whole checkpoint as `directory`, replacing one of that name.

    Args:
        directory: its place.
        save_whole: writes what can be used without the run, into the folder it is given.
        state: plain values; the main process's count.
        optimizer: each process's part of the optimizer's state; shards as DTensors.
        group: the processes of the run, all of which call this.
    """
    temporary = directory.with_name(f".{directory.name}.new")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_whole(temporary)
        write_state(temporary / STATE, {"format": FORMAT, **state})

    try:
        group.on_main(begin)
        save_tensors(optimizer, temporary / OPTIMIZER, group)
        group.on_main(lambda: _put_in_place(temporary, directory))
    except BaseException:
        if group.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _save_model(model: GPT2, directory: Path, tokenizer: Tokenizer | None) -> None:
    """`model.save_pretrained`, with an OSError where the disk does not take it."""
    try:
        model.save_pretrained(directory, tokenizer=tokenizer)
    except WeightsError as error:
        raise OSError(str(error)) from error


def _put_in_place(temporary: Path, directory: Path) -> None:
    aside = displaced(directory)
    for path in temporary.rglob("*"):
        if path.is_file():
            _fsync(path)
    sync_directory(temporary / OPTIMIZER)
    sync_directory(temporary)
    if directory.exists():
        shutil.rmtree(aside, ignore_errors=True)
        directory.rename(aside)
    temporary.rename(directory)
    sync_directory(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
