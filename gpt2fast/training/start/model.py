"""The model that a run starts from: new, a checkpoint's, or the one it was stopped at.

A checkpoint's model gets embeddings for tokens that only the data's tokenizer has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from ...checkpoints.folders import find_weights
from ...config import GPT2Config
from ...data import DataModule
from ...errors import ConfigError, MissingTokenizerError, shown
from ...model import GPT2
from ...tokenizer import Tokenizer
from ..config import DEFAULT_SHAPE, TrainConfig
from ..freezing import frozen_names

_TABLES = ("wte.weight", "lm_head.weight")


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
    """The tokenizer of the data, or if they have none, of the model that is fine-tuned.

    Args:
        config: the settings.
        data: what is trained on.
        resume: the checkpoint to go on from, if any.
        notify: told if the model has none to compare the data's with.

    Raises:
        DataError: the data's is not the model's, nor the model's with tokens added at its end.
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
    return data.tokenizer or tokenizer


def learn_new_tokens(config: TrainConfig, model: GPT2, data: DataModule) -> str | None:
    """Give a checkpoint's model a row for each token of the data's tokenizer.

    Args:
        config: with `init_from`.
        model: the checkpoint's; changed in place.
        data: whose tokenizer is the checkpoint's, or that with tokens added at its end.

    Returns:
        A line on the new tokens, or None if there are none.

    Raises:
        ConfigError: the data hold new tokens, and the run leaves the embedding as it is.
    """
    if data.tokenizer is None or config.init_from is None:
        return None
    try:
        known = Tokenizer.from_pretrained(config.init_from).vocab_size
    except MissingTokenizerError:
        return None
    rows, wanted = model.config.vocab_size, data.tokenizer.vocab_size
    new = [id for id in range(min(known, rows), wanted) if id in data.tokenizer]
    if not new:
        return None
    named = ", ".join(shown(data.tokenizer.decode([id]), 40) for id in new[:5])
    named += f" and {len(new) - 5} more" if len(new) > 5 else ""
    fixed = _why_embedding_stays(config, model)
    first = data.first_from(new[0]) if fixed else None
    if fixed and first is not None:
        raise ConfigError(
            f"{fixed}, and the data hold tokens that {config.init_from} does not know ({named}), "
            "whose embeddings would never be learned: train them first, with --freeze "
            "'wpe,h,ln_f' for nothing else, and go on from that run with --init-from"
        )
    if wanted <= rows:
        return f"vocabulary: {named} begin with rows that the model's {rows} tokens have to spare"
    model.resize_token_embeddings(wanted)
    return (
        f"vocabulary: grown from {rows} to {wanted} tokens ({named}); new embeddings begin as the "
        "mean of the others"
    )


def _why_embedding_stays(config: TrainConfig, model: GPT2) -> str | None:
    if config.lora_rank is not None:
        return f"lora_rank is {config.lora_rank}, which trains adapters alone"
    if config.freeze is None:
        return None
    frozen = [name for name in frozen_names(model, config.freeze) if name in _TABLES]
    return f"freeze is {config.freeze!r}, which keeps {frozen[0]}" if frozen else None


def _with_dropout(model: GPT2, dropout: float) -> GPT2:
    """The same weights in a model whose three dropout rates are `dropout`.

    The weights are copied: loaded ones may lie in a mapped file, and where a tensor lies in memory
    may change the order in which kernels add.
    """
    changed = GPT2(dataclasses.replace(model.config, dropout=dropout), device="meta")
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    changed.load_state_dict(weights, assign=True)
    return changed
