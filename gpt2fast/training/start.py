"""The model that a run starts from: new, a checkpoint's, or the one it was stopped at."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ..config import GPT2Config
from ..data import DataModule
from ..errors import ConfigError
from ..model import GPT2
from ..tokenizer import Tokenizer
from .config import DEFAULT_SHAPE, TrainConfig


def starting_model(config: TrainConfig, data: DataModule, resume: Path | None) -> GPT2:
    """The float32 model to train, on the CPU; new weights are drawn from torch's generator."""
    source = config.init_from if resume is None else resume
    if source is not None:
        return _with_dropout(GPT2.from_pretrained(source, dtype=torch.float32), config.dropout)
    meta = data.meta
    vocab_size = meta.vocab_size or config.vocab_size
    if vocab_size is None:
        raise ConfigError(
            f"{data.directory} does not say how many tokens its vocabulary has; give "
            "--vocab-size (50257 for GPT-2's)"
        )
    return GPT2(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=config.block_size,
            bos_token_id=meta.eos_token_id,
            eos_token_id=meta.eos_token_id,
            dropout=config.dropout,
            n_layer=config.n_layer or DEFAULT_SHAPE["n_layer"],
            n_head=config.n_head or DEFAULT_SHAPE["n_head"],
            n_embd=config.n_embd or DEFAULT_SHAPE["n_embd"],
        )
    )


def starting_tokenizer(
    config: TrainConfig, data: DataModule, resume: Path | None
) -> Tokenizer | None:
    """That of the data; the model that is trained on must have the same, if it has one."""
    if config.init_from is None or resume is not None:
        return data.tokenizer
    tokenizer = Tokenizer.from_pretrained(config.init_from)
    data.check_tokenizer(tokenizer)
    return tokenizer


def _with_dropout(model: GPT2, dropout: float) -> GPT2:
    """The same weights in a model whose three dropout rates are `dropout`.

    The weights are copied: loaded ones may lie in a mapped file, and where a tensor lies in memory
    may change the order in which kernels add.
    """
    changed = GPT2(dataclasses.replace(model.config, dropout=dropout), device="meta")
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    changed.load_state_dict(weights, assign=True)
    return changed
