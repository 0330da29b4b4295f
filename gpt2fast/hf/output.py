"""The output of a language model whose logits are computed when they are first read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from ..nn.output import GPT2Output

_READERS = frozenset({"logits", "items", "values", "get", "to_tuple", "copy", "__reduce__"})


@dataclass
class CausalLMOutput(CausalLMOutputWithCrossAttentions):
    """transformers' output of a language model; the logits of a deferred one come when read."""

    @classmethod
    def deferred(
        cls, loss: Tensor, hidden: Tensor, projection: Tensor, **others: Any
    ) -> CausalLMOutput:
        """An output with a loss, whose logits are (..., width) times (vocab, width)."""
        # In the place of the logits, since an output keeps the order of its fields.
        output = cls(loss=loss, logits=hidden, **others)
        output.__dict__["_source"] = GPT2Output(loss, hidden, projection)
        return output

    def __getattribute__(self, name: str) -> Any:
        if name in _READERS:
            object.__getattribute__(self, "_compute")()
        return super().__getattribute__(name)

    def __getitem__(self, key: Any) -> Any:
        if key == "loss" or (isinstance(key, int) and key == 0):
            return self.loss
        return super().__getitem__(key)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "logits":
            self.__dict__.pop("_source", None)
        super().__setattr__(name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        if key == "logits":
            self.__dict__.pop("_source", None)
        super().__setitem__(key, value)

    def _compute(self) -> None:
        source = self.__dict__.get("_source")
        if source is not None:
            self["logits"] = source.logits
