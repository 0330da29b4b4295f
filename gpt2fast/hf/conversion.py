"""transformers' GPT-2 as ours and back, with the same parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel, PreTrainedModel, pytorch_utils
from transformers.activations import ACT2FN
from transformers.models.gpt2 import modeling_gpt2 as theirs

from ..config import as_config
from ..errors import ArgumentError
from ..model import GPT2
from . import gpt2
from .plain import is_plain

PARTS: frozenset[type[nn.Module]] = frozenset(
    {
        *(theirs.GPT2Model, theirs.GPT2Block, theirs.GPT2Attention, theirs.GPT2MLP),
        *(pytorch_utils.Conv1D, nn.LayerNorm, nn.Embedding, nn.Dropout),
        *(gpt2.GPT2Block, gpt2.GPT2MLP, gpt2.Conv1D, gpt2.LayerNorm),
    }
)
"""The classes of a `GPT2Model`'s modules, activations aside."""
_ENDS = {"bos_token_id", "eos_token_id", "pad_token_id"}
"""What of a generation_config.json decides where texts begin and end."""


def from_hf(model: PreTrainedModel) -> GPT2:
    """A `GPT2` that has the parameters of a `GPT2LMHeadModel` for its own: nothing is copied.

    What trains one trains the other. A model without a language head gets the tied one.

    Args:
        model: a GPT-2 of transformers, of any head, which is left out.

    Raises:
        ArgumentError: not a GPT-2 of transformers, or one with cross-attention, adapters, hooks, or
            parts that its config does not describe.
        ConfigError: its config has something that no GPT2 computes.
    """
    if not isinstance(model, theirs.GPT2PreTrainedModel):
        raise ArgumentError(
            f"from_hf takes a GPT-2 of transformers, such as GPT2LMHeadModel, not "
            f"{type(model).__name__}"
        )
    if model.config.add_cross_attention:
        raise ArgumentError("from_hf takes no model with cross-attention: GPT2 is decoder-only")
    stack: Any = getattr(model, "transformer", model)
    reason = why_not_described(stack)
    if reason is not None:
        raise ArgumentError(f"from_hf takes a model that is what its config says, and {reason}")
    given, config = parameters_of(model), as_config(model.config)
    tied = "lm_head.weight" not in given
    if tied != config.tie_word_embeddings:
        config = replace(config, tie_word_embeddings=tied)
    ours = GPT2(config, device="meta")
    _share(ours, given)
    theirs_too = getattr(model, "generation_config", None)
    named = {name: getattr(theirs_too, name, None) for name in _ENDS}
    ours.generation_config = {name: id for name, id in named.items() if id is not None}
    return ours.train(model.training)


def parameters_of(model: Any) -> dict[str, nn.Parameter]:
    """The parameters of a GPT-2 of transformers by the names of ours, a tied head's left out."""
    stack = getattr(model, "transformer", model)
    found = dict(stack.named_parameters())
    head = getattr(model, "lm_head", None)
    if head is not None and head.weight is not stack.wte.weight:
        found["lm_head.weight"] = head.weight
    return found


def why_not_described(stack: Any) -> str | None:
    """Why a `GPT2Model` computes something else than its config says, in words; None if it does
    not.

    A head around it is not looked at.
    """
    config = stack.config
    activation = type(ACT2FN[config.activation_function])
    for name, module in stack.named_modules():
        kind = type(module)
        if kind is nn.ModuleList:
            continue
        if not (kind is activation or kind in PARTS) or not is_plain(module, kind):
            return f"{name or 'the model'} is watched, or is no part of GPT-2"
        if isinstance(module, nn.LayerNorm) and module.eps != config.layer_norm_epsilon:
            return f"{name} has another epsilon"
    for index, block in enumerate(stack.h):
        attn = block.attn
        scaling = attn.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scaling /= index + 1
        if (attn.layer_idx, attn.num_heads) != (index, config.n_head) or attn.scaling != scaling:
            return f"h.{index}.attn has another scaling, other heads, or another place"
        if type(block.mlp.act) is not activation:
            return f"h.{index}.mlp has another activation"
    return None


def to_hf(model: GPT2) -> GPT2LMHeadModel:
    """A `GPT2LMHeadModel` that has the parameters of a `GPT2` for its own: nothing is copied.

    Raises:
        ArgumentError: the model has adapters, or other parts in place of GPT-2's.
    """
    config = TheirConfig(**model.config.to_dict())
    with torch.device("meta"):
        made = GPT2LMHeadModel(config)
    given = {f"transformer.{name}": x for name, x in model.named_parameters()}
    head = given.pop("transformer.lm_head.weight", given.get("transformer.wte.weight"))
    if head is not None:
        given["lm_head.weight"] = head
    _share(made, given)
    for name in _ENDS & model.generation_config.keys():
        setattr(made.generation_config, name, model.generation_config[name])
    return made.train(model.training)


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
