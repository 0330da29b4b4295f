"""What a run leaves on the disk: checkpoints to go on from, and at the end the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.meta import DataMeta
from ...lora import merge
from ...model import GPT2
from ...tokenizer import Tokenizer
from ..config import TrainConfig
from ..distributed import Group
from ..machine.precision import LossScale
from ..optimizers import ModelOptimizer
from ..start.adapters import adapter_state, save_adapter_beside
from ..start.data import located
from . import save as ckpt
from .position import Position


class Saver:
    """Writes the files of one run; every process calls it, the main one writes what is whole."""

    def __init__(
        self, config: TrainConfig, meta: DataMeta, tokenizer: Tokenizer | None, group: Group
    ) -> None:
        self.config, self.meta, self.tokenizer, self.group = config, meta, tokenizer, group

    def save(
        self,
        directory: Path,
        model: GPT2,
        optimizer: ModelOptimizer,
        position: Position,
        scale: LossScale,
    ) -> None:
        """Write a checkpoint of this moment as `directory`."""
        state = {
            "config": {**self.config.to_dict(), **located(self.config)},
            "data": data_identity(self.meta),
            "position": dataclasses.asdict(position),
            "updates": optimizer.updates,
            "scale": scale.state_dict(),
            "adapters": adapter_state(model),
            "random": self.group.gathered(ckpt.random_states()),
        }
        weights = self.group.whole_state(model)

        def save_whole(folder: Path) -> None:
            ckpt.save_model(self.whole(model, weights), folder, self.tokenizer)
            save_adapter_beside(model, folder, self.config)

        ckpt.save_checkpoint(directory, save_whole, state, optimizer.tensors(), self.group)

    def export_model(self, model: GPT2) -> None:
        """Write the finished model into the run folder, adapters merged and by themselves."""
        weights = self.group.whole_state(model)
        out = Path(self.config.out)

        def write() -> None:
            finished = merge(self.whole(model, weights))
            finished.to(getattr(torch, self.config.save_dtype))
            ckpt.save_model(finished, out, self.tokenizer)
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
    """What tells one prepared data set from another."""
    names = ("tokenizer_fingerprint", "vocab_size", "train_tokens", "val_tokens")
    return {name: getattr(meta, name) for name in names}
