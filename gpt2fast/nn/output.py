"""Loss and logits of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..errors import ArgumentError
from ..ops.derivatives import is_transformed
from ..ops.projection import linear

_FIELDS = ("loss", "logits", "past_key_values", "hidden_states", "attentions")
"""In transformers' order."""

LOGITS_ALONE: dict[str, Any] = {"output_hidden_states": False, "output_attentions": False}
"""Arguments of a call that reads logits and loss, whatever the model's config asks for."""


class GPT2Output:
    """Loss and logits of a forward pass, and what else was asked for.

    With labels or targets the logits are computed when they are first read, so that the loss alone
    never needs a (B, T, vocab) tensor. They are what the forward pass would have computed, under
    its gradient mode and autocast; changing the weights in between is an error.

    As of transformers' outputs, `output["loss"]`, `output[0]`, `output[:2]`, `output.to_tuple()`
    and `dict(output)` have what is not None: the loss, the logits, `past_key_values`,
    `hidden_states`, `attentions`, in this order.

    Args:
        loss: scalar, or None.
        hidden: (B, T, width) hidden states.
        projection: (vocab, width) weight of the logits.
    """

    past_key_values: Any = None
    """The cache with the new tokens, in the form that was given; `cache` is another name for it."""
    hidden_states: tuple[Tensor | None, ...] | None = None
    """n_layer + 1 tensors (B, T, width): each block's input, and the last layer norm's output. None
    in the places of those that were not asked for, where some were by index."""
    attentions: tuple[Tensor, ...] | None = None
    """n_layer tensors (B, H, T, S): each block's attention weights."""

    def __init__(self, loss: Tensor | None, hidden: Tensor, projection: Tensor):
        self.loss = loss
        """Scalar mean loss in nats, or None without labels and targets."""
        self._logits = linear(hidden, projection) if loss is None else None
        if loss is not None:
            device = "cpu" if hidden.is_meta else hidden.device.type  # meta has no autocast
            self._hidden, self._projection = hidden, projection
            self._grad, self._device = torch.is_grad_enabled(), device
            self._autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            # Traced programs and tensors made in inference mode have no count of changes.
            counted = not torch.compiler.is_compiling() and not projection.is_inference()
            self._version = projection._version if counted else None
            self._sample = _sample(projection) if counted else None

    @classmethod
    def computed(cls, loss: Tensor | None, logits: Tensor) -> GPT2Output:
        """An output with this `loss` and given `logits`, (B, T, vocab)."""
        output = cls.__new__(cls)
        output.loss, output._logits = loss, logits
        return output

    @property
    def logits(self) -> Tensor:
        """(B, T, vocab), or the positions kept by `logits_to_keep`.

        Raises:
            ArgumentError: read for the first time after the weights were changed.
        """
        if self._logits is None:
            if self._weights_changed():
                raise ArgumentError(
                    "the weights were changed after this forward pass, which did not need its "
                    "logits until now: read .logits before the optimizer's step"
                )
            enabled, dtype = self._autocast
            with (
                torch.inference_mode(self._hidden.is_inference()),
                torch.set_grad_enabled(self._grad),
                torch.autocast(self._device, dtype, enabled=enabled),
            ):
                self._logits = linear(self._hidden, self._projection)
        return self._logits

    @logits.setter
    def logits(self, logits: Tensor) -> None:
        self._logits = logits

    def keys(self) -> list[str]:
        """Names of what is not None, in order."""
        # Without reading the logits, which may not be computed yet.
        return [name for name in _FIELDS if name == "logits" or getattr(self, name) is not None]

    def values(self) -> list[Any]:
        """What is not None, in order."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Names of what is not None, each with its value."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, key: str, default: Any = None) -> Any:
        """The value called `key`, or `default` where there is none."""
        return getattr(self, key) if key in self.keys() else default

    def to_tuple(self) -> tuple[Any, ...]:
        """What is not None, in order."""
        return tuple(self.values())

    @property
    def cache(self) -> Any:
        """`past_key_values`, as transformers calls it from 5.24 on."""
        return self.past_key_values

    def __getitem__(self, key: str | int | slice) -> Any:
        names = self.keys()
        if isinstance(key, str):
            if key not in names:
                raise KeyError(key)
            return getattr(self, key)
        if isinstance(key, slice):
            return tuple(getattr(self, name) for name in names[key])
        return getattr(self, names[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def _weights_changed(self) -> bool:
        if self._version is None:
            return False
        if self._projection._version != self._version:
            return True
        # Changes through `.data` are not counted.
        before, now = self._sample, _sample(self._projection)
        return before is not None and (now is None or not torch.equal(now, before))


def _sample(weight: Tensor) -> Tensor | None:
    """The bytes of some thousand elements of a matrix, spread over its rows and columns; None if it
    has no memory of its own to read."""
    if type(weight) not in (Tensor, Parameter) or weight.is_meta or is_transformed():
        return None
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // 4093)].clone().view(torch.uint8)
