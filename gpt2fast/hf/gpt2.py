"""The parts of transformers' GPT-2 with forwards on fused ops.

Each class derives from the one of transformers (or torch) whose name it has, adds no attribute, and
does exactly what that one does: `fuse` sets the `__class__` of modules to these, so that
parameters, names, hooks and state dicts stay, and whoever asks for a module's class by type or name
finds it. What is watched (hooks, adapters, another module in place of a part) is called as
transformers calls it.
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import pytorch_utils
from transformers.activations import NewGELUActivation
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gpt2 import modeling_gpt2 as theirs

from .. import ops
from .output import CausalLMOutput
from .plain import is_plain

_FEW_ROWS = 8
"""Rows of a decoding step. Measured with one (docs/performance.md); where ours win is not."""


def _is_a_step(x: Tensor) -> bool:
    """True for the few rows of a decoding step on a CPU: calling an op costs more than it saves."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False  # a traced program is for all numbers of rows
    return x.numel() <= _FEW_ROWS * x.shape[-1]


class Conv1D(pytorch_utils.Conv1D):
    """`x @ weight + bias`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if _is_a_step(x):
            return super().forward(x)
        return ops.projection(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer normalization over the last dimension, with weight and bias."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """(..., width) -> (..., width)."""
        return super().forward(input) if _is_a_step(input) else self.add(input, None)[0]

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The normalized sum of two tensors (..., width), and the sum."""
        return ops.residual_layer_norm(x, residual, self.weight, self.bias, self.eps)


class FusedMLP:
    """Two projections with GELU between them, in one op: mixed into an MLP of transformers."""

    c_fc: Any
    act: Any
    c_proj: Any
    dropout: Any

    def forward(self, hidden_states: Any) -> Tensor:
        """(..., width) -> (..., width)."""
        fc, proj = self.c_fc, self.c_proj
        if not (
            is_plain(fc, Conv1D)
            and is_plain(proj, Conv1D)
            and is_plain(self.act, NewGELUActivation)
        ):
            return super().forward(hidden_states)  # type: ignore[misc,no-any-return]
        if _is_a_step(hidden_states):
            x = proj(F.gelu(fc(hidden_states), approximate="tanh"))
        else:
            x = ops.gelu_mlp(hidden_states, fc.weight, fc.bias, proj.weight, proj.bias)
        return self.dropout(x)  # type: ignore[no-any-return]


class GPT2MLP(FusedMLP, theirs.GPT2MLP):
    """GPT-2's MLP."""


_BLOCK_ARGUMENTS = [
    name
    for name, parameter in inspect.signature(theirs.GPT2Block.forward).parameters.items()
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
][2:]


class GPT2Block(theirs.GPT2Block):
    """A block whose first addition is part of the layer normalization after it."""

    @wraps(theirs.GPT2Block.forward)
    def forward(  # type: ignore[override]
        self, hidden_states: Any, *args: Any, **options: Any
    ) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        given = dict(zip(_BLOCK_ARGUMENTS, args, strict=False)) | options
        if (
            given.get("encoder_hidden_states") is not None
            or not is_plain(self.ln_2, LayerNorm)
            or _is_a_step(hidden_states)
        ):
            return super().forward(hidden_states, *args, **options)
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            given.pop(name, None)
        attended, _ = self.attn(self.ln_1(hidden_states), **given)
        normed, stream = self.ln_2.add(attended, hidden_states)
        return stream + self.mlp(normed)


_LABELS = [*inspect.signature(theirs.GPT2LMHeadModel.forward).parameters].index("labels") - 1


class GPT2LMHeadModel(theirs.GPT2LMHeadModel):
    """A language model whose loss never needs all logits at once."""

    @wraps(theirs.GPT2LMHeadModel.forward)
    def forward(self, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        """As transformers' model; with labels, logits are computed when they are first read."""
        if not self._fuses_loss(args, options):
            return super().forward(*args, **options)
        others = {name: options[name] for name in options.keys() - _OF_THE_HEAD}
        found = self.transformer(*args, **others)
        hidden, weight = found.last_hidden_state, self.lm_head.weight
        kept, targets = hidden, options.get("shift_labels")
        if targets is None:
            kept, targets = hidden[:, :-1], options["labels"][:, 1:]
        loss = _causal_loss(
            kept.reshape(-1, kept.shape[2]),
            weight,
            targets.reshape(-1).to(hidden.device),
            options.get("num_items_in_batch"),
            options.get("ignore_index", -100),
        )
        return CausalLMOutput.deferred(
            loss,
            hidden,
            weight,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            cross_attentions=found.cross_attentions,
            **{_CACHE: getattr(found, _CACHE)},
        )

    def _fuses_loss(self, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        """True if transformers would compute the mean loss of a plain projection, and only that."""
        labels = options.get("labels")
        tokens = args[0] if args else options.get("input_ids")
        tokens = options.get("inputs_embeds") if tokens is None else tokens
        return (
            labels is not None
            and tokens is not None
            and labels.dim() == 2
            and labels.shape == tokens.shape[:2]
            and len(args) <= _LABELS
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and isinstance(options.get("logits_to_keep", 0), int)
            and options.get("logits_to_keep", 0) == 0
            and options.get("return_dict", getattr(self.config, "return_dict", True)) is not False
            and self.loss_function is ForCausalLMLoss
            and is_plain(self.lm_head, nn.Linear)
            and self.lm_head.bias is None
            and self.lm_head.weight.shape[0] == self.config.vocab_size
        )


_OF_THE_HEAD = {"labels", "logits_to_keep", "return_dict"}
_CACHE = next(x.name for x in fields(CausalLMOutput) if x.name in ("past_key_values", "cache"))
"""The name of an output's cache, which transformers 5.24 changed."""


def _causal_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, items: Tensor | int | None, ignored: int
) -> Tensor:
    """The loss as transformers' `ForCausalLMLoss`: the mean, or the sum over a number of items."""
    loss = ops.linear_cross_entropy(hidden, weight, targets, ignored)
    if items is None:
        return loss
    count = (targets != ignored).sum()
    if isinstance(items, Tensor):
        items = items.to(loss.device)
    # The mean of no target is NaN, their sum 0.
    return torch.where(count > 0, loss * (count / items), 0.0)
