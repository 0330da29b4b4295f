"""Write checkpoints: a loadable model folder and what it takes to continue the run bit for bit.

A folder is written beside its place and renamed into it, and renamed before it is deleted, so a
name in checkpoints/ is always a whole checkpoint. Any number of processes can read what any other
number has written.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._system.files import sync_directory
from ...checkpoints.run_folder import ADAPTER, OPTIMIZER, STATE
from ...data.meta import DataMeta
from ...errors import WeightsError
from ...lora import is_adapted, merge, save_adapter
from ...model import GPT2
from ...tokenizer import Tokenizer
from ..start.adapters import adapter_state
from ..start.data import located
from ..step import TrainStep
from .folder import displaced
from .position import Position
from .shards import save_tensors
from .state import FORMAT, random_states, write_state


class Saver:
    """Writes a run's models; all processes call it, and the main one writes what is whole."""

    def __init__(self, training: TrainStep, meta: DataMeta, tokenizer: Tokenizer | None) -> None:
        self.training, self.meta, self.tokenizer = training, meta, tokenizer

    def save(self, directory: Path, position: Position) -> None:
        """Write a checkpoint of this moment as `directory`, replacing one of that name."""
        training, group = self.training, self.training.group
        state = {
            "format": FORMAT,
            "config": {**training.config.to_dict(), **located(training.config)},
            "data": data_identity(self.meta),
            "position": dataclasses.asdict(position),
            "updates": training.optimizer.updates,
            "scale": training.scale.state_dict(),
            "adapters": adapter_state(training.model),
            "random": group.gathered(random_states()),
        }
        weights = group.whole_state(training.model)
        temporary = directory.with_name(f".{directory.name}.new")

        def begin() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            self._write(self.whole(weights), temporary)
            write_state(temporary / STATE, state)

        try:
            group.on_main(begin)
            save_tensors(training.optimizer.tensors(), temporary / OPTIMIZER, group)
            group.on_main(lambda: _put_in_place(temporary, directory))
        except BaseException:
            if group.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def export_model(self) -> None:
        """Write the finished model into the run folder, adapters merged and by themselves."""
        config, group = self.training.config, self.training.group
        weights = group.whole_state(self.training.model)

        def write() -> None:
            finished = merge(self.whole(weights)).to(getattr(torch, config.save_dtype))
            self._write(finished, Path(config.out))

        group.on_main(write)

    def whole(self, weights: dict[str, Tensor]) -> GPT2:
        """The model itself, or where its weights are shards, one that holds `weights`."""
        model = self.training.model
        if self.training.group.size == 1 or self.training.config.parallel != "fsdp":
            return model
        whole = GPT2(model.config, device="meta")
        whole.load_state_dict(weights, assign=True)
        return whole

    def _write(self, model: GPT2, folder: Path) -> None:
        trained, origin = self.training.model, self.training.config.init_from
        try:
            model.save_pretrained(folder, tokenizer=self.tokenizer)
            if is_adapted(trained):
                save_adapter(trained, folder / ADAPTER, origin)
        except WeightsError as error:  # the disk does not take it
            raise OSError(str(error)) from error


def data_identity(meta: DataMeta) -> dict[str, Any]:
    """The values by which prepared data sets differ."""
    names = ("tokenizer_fingerprint", "vocab_size", "train_tokens", "val_tokens")
    return {name: getattr(meta, name) for name in names}


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
