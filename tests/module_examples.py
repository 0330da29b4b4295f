"""The models of docs/modules.md, in a module: other processes import them and pickle finds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from documentation import ROOT, fences

PAGE: dict[str, Any] = {"__name__": __name__}
"""Names that the page's snippets define."""

for _fence in fences(ROOT / "docs" / "modules.md"):
    if _fence.language == "python":
        exec(compile("\n" * _fence.line + _fence.text, str(_fence.page), "exec"), PAGE)
globals().update(
    {name: value for name, value in PAGE.items() if getattr(value, "__module__", "") == __name__}
)


@dataclass(frozen=True)
class Example:
    """A model of the page, small, and what it learns from."""

    build: Callable[[], nn.Module]
    batch: Callable[[int, int], tuple[Tensor, ...]]
    """Inputs and, last, targets: of a number of rows, and of positions where it may be chosen."""
    block: type[nn.Module]
    """The class of its blocks."""


def loss_of(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The loss of a batch, inputs and targets."""
    output = model(*batch)
    return output[1] if isinstance(output, tuple) else output


def reset(model: nn.Module) -> None:
    """Draw new weights for all modules."""
    for part in model.modules():
        draw: Any = getattr(part, "reset_parameters", None)
        if draw is not None:
            draw()


def next_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets, contiguous as from a data loader."""
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _gpt_batch(rows: int, length: int) -> tuple[Tensor, ...]:
    return next_tokens(torch.randint(65, (rows, length + 1)))


def _decoder_batch(rows: int, length: int) -> tuple[Tensor, ...]:
    ids, targets = next_tokens(torch.randint(65, (rows, length + 1)))
    return ids, torch.randn(rows, 9, 48), targets


def _vit_batch(rows: int, length: int) -> tuple[Tensor, ...]:
    return torch.randn(rows, 3, 32, 32), torch.randint(10, (rows,))


EXAMPLES = {
    "gpt": Example(
        lambda: PAGE["GPT"](vocabulary=65, length=64, width=48, layers=2, heads=3, dropout=0.1),
        _gpt_batch,
        PAGE["Block"],
    ),
    "decoder": Example(
        lambda: PAGE["Decoder"](vocabulary=65, length=64, width=48, layers=2, heads=6, key_heads=2),
        _decoder_batch,
        PAGE["DecoderBlock"],
    ),
    "vit": Example(
        lambda: PAGE["ViT"](classes=10, size=32, patch=8, width=48, layers=2, heads=6, key_heads=2),
        _vit_batch,
        PAGE["EncoderBlock"],
    ),
}
