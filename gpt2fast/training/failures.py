"""Errors that end a run: a full disk, no memory, numbers that are no longer finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Error, is_out_of_memory
from .config import TrainConfig
from .folder import resume_hint

ALL_FINITE = (
    "every weight, activation and gradient is finite, but their squares add up to more than a float"
)


class TrainingError(Error):
    """The run cannot go on: the loss is no longer finite, the disk or the memory is full, …"""


@contextmanager
def failures_explained(config: TrainConfig) -> Iterator[None]:
    """Turn errors of disk and memory into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        reason = f"{where}{error.strerror or error}"
        raise TrainingError(
            f"cannot train in {config.out}: {reason}; {resume_hint(Path(config.out))}. Make room, "
            "or name another folder with --out"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory; {resume_hint(Path(config.out))}. {how_to_save_memory(config)}"
        ) from error


def how_to_save_memory(config: TrainConfig) -> str:
    """Advice for a run that does not fit into memory."""
    spared = "" if config.checkpoint_activations else "add --checkpoint-activations, "
    return (
        f"Lower --batch-size (now {config.batch_size}; --grad-accumulation keeps the tokens of a "
        f"step), --block-size (now {config.block_size}), {spared}or train a smaller model"
    )


def broken_weights(model: nn.Module) -> str | None:
    """The first parameter with a value that is not finite."""
    return next((name for name, param in model.named_parameters() if not _finite(param)), None)


@torch.no_grad()
def first_not_finite(model: nn.Module, forward: Callable[[], Any] | None = None) -> str:
    """Name what is not finite, as part of a sentence.

    Args:
        model: after a backward pass, before the step.
        forward: runs the model on the batch that failed; None where that cannot be done.
    """
    weights = broken_weights(model)
    if weights is not None:
        return f"the weights {weights} are not finite"
    layer = None if forward is None else _first_layer(model, forward)
    if layer is not None:
        return f"the first values that are not finite come out of {layer}"
    for name, param in model.named_parameters():
        if param.grad is not None and not _finite(param.grad):
            return f"the gradient of {name} is not finite"
    return ALL_FINITE


def _finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(torch.isfinite(local).all())


def _first_layer(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
            for tensor in outputs if isinstance(outputs, tuple) else (outputs,):
                if isinstance(tensor, Tensor) and not found and not _finite(tensor):
                    found.append(name)

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
