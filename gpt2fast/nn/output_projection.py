"""Output projections: hidden states to logits, with a weight of their own or the embedding's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..ops.projection import linear
from .initialization import Device, Dtype
from .plain import readable


@readable
class OutputProjection(nn.Linear):
    """`nn.Linear` without a bias, initialized like GPT-2's embeddings.

    Args:
        in_features, out_features: width, and size of the vocabulary.
        std: standard deviation of the initial weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        std: float = 0.02,
        *,
        device: Device = None,
        dtype: Dtype = None,
    ):
        self.std = std
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, std^2)."""
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=self.std)


@readable
class TiedOutputProjection(nn.Module):
    """An output projection that uses the token embedding's weight and has none of its own, so that
    `parameters()` and `state_dict()` hold the weight once.

    Args:
        model: the owner of the weight, `model.projection` (vocab, width); referenced weakly.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.tie(model)

    def tie(self, model: nn.Module) -> None:
        """Take the weight from this model."""
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)

    @property
    def model(self) -> nn.Module | None:
        """The model that owns the weight; None if it no longer exists."""
        return self._model()

    @property
    def weight(self) -> Tensor:
        """(vocab, width): that of the token embedding.

        Raises:
            ArgumentError: the model no longer exists.
        """
        model = self._model()
        if model is None:
            raise ArgumentError("this lm_head was tied to a model that is gone: keep the model")
        return cast("Tensor", model.projection)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., width) hidden states -> (..., vocab) logits."""
        return linear(hidden, self.weight)

    def extra_repr(self) -> str:
        """Shown by print."""
        return "tied to the token embedding"

    def __getstate__(self) -> dict[str, Any]:
        # The model ties it again when it is copied or loaded.
        return {**super().__getstate__(), "_model": _no_model}  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        model = self._model()
        if model is None or id(model) in memo:  # the model is being copied, too
            copy = type(self).__new__(type(self))
            memo[id(self)] = copy
            copy.__setstate__(deepcopy(self.__getstate__(), memo))
            return copy
        # Copied without its model, it gets a weight of its own.
        weight = self.weight.detach()
        alone = OutputProjection(weight.shape[1], weight.shape[0], 0.0, device="meta")
        alone.weight = nn.Parameter(weight.clone())
        return alone

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        # transformers saves the tied weight under both names; the embedding has loaded it already.
        head, errors = state_dict.get(f"{prefix}weight"), arguments[-1]
        if head is None or self._model() is None or head.is_meta or self.weight.is_meta:
            return
        if head.shape != self.weight.shape or not torch.equal(head.to(self.weight), self.weight):
            errors.append(
                f"{prefix}weight is not wte.weight, to which this model's lm_head is tied; give "
                "the configuration tie_word_embeddings=False"
            )


def tie_untied(model: nn.Module) -> None:
    """Tie to a model its projections, if copying or loading it left them untied."""
    for module in model.modules():
        if isinstance(module, TiedOutputProjection) and module.model is None:
            module.tie(model)


def _no_model() -> None:
    """Placeholder for the reference to a model, in a copy that is not tied yet."""
