"""The model that a run starts from: new, a checkpoint's, or the one it was stopped at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from ..config import GPT2Config
from ..data import DataModule
from ..errors import ConfigError, MissingTokenizerError
from ..model import GPT2
from ..tokenizer import Tokenizer
from ..weights import find_weights
from .config import DEFAULT_SHAPE, TrainConfig


def check_start(config: TrainConfig) -> None:
    """Raise WeightsError if `init_from` leads to no weights, before a long text is prepared."""
    if config.init_from is not None:
        find_weights(config.init_from)


def starting_model(config: TrainConfig, data: DataModule, resume: Path | None) -> GPT2:
    """The float32 model to train, on the CPU; new weights are drawn from torch's generator."""
    source = config.init_from if resume is None else resume
    if source is not None:
        return _with_dropout(GPT2.from_pretrained(source, dtype=torch.float32), config.dropout)
    meta = data.meta
    vocab_size = meta.vocab_size or config.vocab_size
    if meta.asked_vocab_size is None and config.vocab_size is not None:
        vocab_size = config.vocab_size  # padded, where the data have a smaller one
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
    config: TrainConfig, data: DataModule, resume: Path | None, notify: Callable[[str], None]
) -> Tokenizer | None:
    """That of the data; the model that is trained on must have the same, if it has one.

    Args:
        config: the settings.
        data: what is trained on.
        resume: the checkpoint to go on from, if any.
        notify: told where the model has none, so that nobody can compare the two.
    """
    if config.init_from is None or resume is not None:
        return data.tokenizer
    try:
        tokenizer = Tokenizer.from_pretrained(config.init_from)
    except MissingTokenizerError:
        notify(
            f"{config.init_from} has no tokenizer beside it; that of the data is taken for the "
            "model's: with another one it would have to learn from the beginning"
        )
        return data.tokenizer
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
