"""Look into a training run, or disturb it, through torch's own hooks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gpt2fast.model import GPT2


@contextmanager
def before_updates(action: Callable[[int], None]) -> Iterator[None]:
    """Call `action` before each update of the weights with its number, from 0.

    It stands after the update's backward pass; a run with two optimizers counts two for each step.
    """
    count = itertools.count()
    handle = register_optimizer_step_pre_hook(lambda *_: action(next(count)))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after_updates(action: Callable[[int, torch.optim.Optimizer], None]) -> Iterator[None]:
    """Call `action` after each update of the weights with its number, from 0, and the optimizer."""
    count = itertools.count()
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: action(next(count), optimizer))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def changed_losses(change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Put `change(number, loss)` in place of the loss of each training pass, counted from 0.

    Modules with hooks are called one by one, with other kernels: their last bits may differ.
    """
    count = itertools.count()

    def hook(module: torch.nn.Module, args: object, output: object) -> None:
        if isinstance(module, GPT2) and module.training:
            output.loss = change(next(count), output.loss)  # type: ignore[attr-defined]

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def windows_read() -> Iterator[list[list[int]]]:
    """The windows that models in training read, in order."""
    windows: list[list[int]] = []

    def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(module, GPT2) and module.training:
            windows.extend(args[0].tolist())

    handle = register_module_forward_pre_hook(hook)
    try:
        yield windows
    finally:
        handle.remove()
