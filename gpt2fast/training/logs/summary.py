"""The lines with which a run begins and ends."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from ..._system.invocation import command_line
from ..._system.memory import available
from ...checkpoints.run_folder import BEST, CHECKPOINTS
from ...data import DataMeta
from ..checkpoints.position import TrainResult
from ..failures import how_to_save_memory
from ..machine import memory
from ..start.adapters import describe_training
from ..step import TrainStep
from .progress import format_val


def introduction(
    training: TrainStep, meta: DataMeta, steps: int, learned: str | None
) -> Iterator[str]:
    """The model, the data, the processes, and the memory that they will take.

    Args:
        training: the model and its settings.
        meta: of the data.
        steps: length of the run.
        learned: a line on tokens that are new to the model.
    """
    config, shape, group = training.config, training.model.config, training.group
    yield (
        f"model: {shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide, "
        f"{shape.vocab_size} tokens in the vocabulary, {shape.parameter_count:,} parameters; "
        f"{config.dtype} on {group.device}"
    )
    yield from filter(None, (learned, describe_training(training.model)))
    tokens = config.micro_batches(steps) * config.batch_size * config.block_size
    yield (
        f"data: {meta.train_tokens:,} tokens to train on, {meta.val_tokens:,} held out; "
        f"{tokens:,} tokens a step, {steps:,} steps"
    )
    if group.size > 1:
        yield f"{group.size} processes, {config.parallel}"
    yield from _predicted_memory(training)


def _predicted_memory(training: TrainStep) -> Iterator[str]:
    config, device = training.config, training.group.device
    rows = range(config.batch_size)[training.share(0)[1]]
    need = memory.predict(
        training.model.config,
        len(rows) * config.block_size,
        dtype=config.dtype,
        trained=sum(p.numel() for p in training.optimizer.params),
        optimizer_state=training.optimizer.state_bytes(),
        checkpoint_activations=config.checkpoint_activations,
        parallel=config.parallel,
        processes=training.group.size,
    )
    weights = sum(param.nbytes for param in training.model.parameters())
    before = max(memory.held(device) - weights, 0)
    there = available(device)
    yield (
        f"memory: about {memory.gib(before + need.total)} predicted ({memory.gib(need.state)} "
        f"weights, gradients and optimizer, {memory.gib(need.activations)} activations, "
        f"{memory.gib(before)} taken already)"
        + ("" if there is None else f"; {memory.gib(there)} available")
    )
    if there is not None and need.total - weights > there:
        yield f"warning: that may not fit. {how_to_save_memory(config)}"


def conclusion(ended: str, result: TrainResult, seconds: float, tokenizer: bool) -> Iterator[str]:
    """The losses of a finished run, and the command that tries its model.

    Args:
        ended: the reason for its end.
        result: of the run.
        seconds: that it took.
        tokenizer: a tokenizer is saved with the model.
    """
    yield (
        f"{ended}: {result.steps} steps, {result.tokens:,} tokens, {seconds:,.0f} s; validation "
        f"loss in nats per token {format_val(result.val_loss, result.val_loss_per_char)}"
    )
    if result.best_step not in (-1, result.steps):
        yield (
            f"the best validation loss was {result.best_val_loss:.4f}, at step "
            f"{result.best_step}: {Path(result.out) / CHECKPOINTS / BEST}"
        )
    named = "" if tokenizer else " --tokenizer NAME"
    yield f"try it:\n  {command_line('generate')} --model {shlex.quote(str(result.out))}{named}"
