"""transformers' GPT-2 as ours and back, with the same parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel

from ..config import as_config
from ..errors import ArgumentError
from ..model import GPT2


def from_hf(model: PreTrainedModel) -> GPT2:
    """A `GPT2` that has the parameters of a `GPT2LMHeadModel` for its own: nothing is copied.

    What trains one trains the other. A model without a language head gets the tied one.

    Args:
        model: a GPT-2 of transformers, of any head, which is left out.

    Raises:
        ArgumentError: not a GPT-2 of transformers, or one with cross-attention or adapters.
        ConfigError: its config has something that no GPT2 computes.
    """
    if not isinstance(model, GPT2PreTrainedModel):
        raise ArgumentError(
            f"from_hf takes a GPT-2 of transformers, such as GPT2LMHeadModel, not "
            f"{type(model).__name__}"
        )
    if model.config.add_cross_attention:
        raise ArgumentError("from_hf takes no model with cross-attention: GPT2 is decoder-only")
    stack: Any = getattr(model, "transformer", model)
    given = dict(stack.named_parameters())
    head: Any = getattr(model, "lm_head", None)
    config = as_config(model.config)
    tied = head is None or head.weight is stack.wte.weight
    if tied != config.tie_word_embeddings:
        config = replace(config, tie_word_embeddings=tied)
    if head is not None and not tied:
        given["lm_head.weight"] = head.weight
    ours = GPT2(config, device="meta")
    _share(ours, given)
    return ours.train(model.training)


def to_hf(model: GPT2) -> GPT2LMHeadModel:
    """A `GPT2LMHeadModel` that has the parameters of a `GPT2` for its own: nothing is copied.

    Raises:
        ArgumentError: the model has adapters, or other parts in place of GPT-2's.
    """
    config = TheirConfig(**model.config.to_dict())
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(config)
    given = {f"transformer.{name}": x for name, x in model.named_parameters()}
    head = given.pop("transformer.lm_head.weight", given.get("transformer.wte.weight"))
    if head is not None:
        given["lm_head.weight"] = head
    _share(theirs, given)
    return theirs.train(model.training)


def _share(model: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Make `given` the parameters of a model on the device "meta".

    Raises:
        ArgumentError: they are not the model's.
    """
    wanted = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if wanted != given.keys():
        odd = sorted(given.keys() ^ wanted)
        raise ArgumentError(
            f"the model's parameters are not just GPT-2's: {', '.join(odd[:4])}"
            f"{' and others' if len(odd) > 4 else ''}; merge adapters first"
        )
    for name, parameter in given.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)
