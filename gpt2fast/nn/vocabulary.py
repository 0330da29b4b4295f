"""Size of the vocabulary: rows of the embedding and of the output projection."""

from __future__ import annotations

from dataclasses import replace
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, shown
from .changes import weights_moved
from .embedding import Embedding
from .inputs import check_held
from .output_projection import TiedOutputProjection


def resize_token_embeddings(
    model: Any,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> Embedding:
    """Change the number of a model's tokens, in place: append rows, or drop the last ones.

    `wte` and `lm_head` keep their rows, dtype, device and `requires_grad`; a tied projection stays
    tied, and `config.vocab_size` becomes the new number. Names and meaning are transformers',
    except for the new rows: those are exactly the mean of the old ones, so that a new token is no
    likelier than an average one. (transformers adds noise with a billionth of the old rows'
    covariance, or none where that is too small.) Nothing is random, so the same call gives the same
    model again.

    The parameters stay the objects that they were, without gradients. An optimizer that has made
    no step can still be used; one that has holds averages of the old shape: make a new one. Resize
    before the model is wrapped, as in DDP.

    Args:
        model: a GPT2, with adapters or without; packed and quantized ones are refused.
        new_num_tokens: the new number; None keeps the old one.
        pad_to_multiple_of: round it up to a multiple of this; 64 or 128 suit matrix products.
        mean_resizing: False draws new rows from N(0, initializer_range^2) instead.

    Returns:
        `wte`.

    Raises:
        ArgumentError: an invalid number, or a model whose tables cannot be resized: released,
            sharded, or with something else in the place of `wte` or `lm_head`.
        ConfigError: more tokens than a vocabulary may have.
    """
    tables = _tables(model)
    rows = len(model.wte.weight)
    wanted = rows if new_num_tokens is None else _count("new_num_tokens", new_num_tokens)
    if pad_to_multiple_of is not None:
        multiple = _count("pad_to_multiple_of", pad_to_multiple_of)
        wanted = -(-wanted // multiple) * multiple
    config = replace(model.config, vocab_size=wanted, dropout=None)
    std = None if mean_resizing else config.initializer_range
    for table in tables:
        for parameter in table.parameters():
            with torch.inference_mode(parameter.is_inference()), torch.no_grad():
                _resize(parameter, wanted, std)
    model.wte.num_embeddings = wanted
    if model.wte.padding_idx is not None and model.wte.padding_idx >= wanted:
        model.wte.padding_idx = None
    for head in tables[1:]:
        head.out_features = wanted  # type: ignore[assignment]
    model.config = config
    weights_moved(model)
    return model.wte


def _tables(model: Any) -> list[nn.Module]:
    """`wte`, and `lm_head` where it has a table of its own."""
    check_held(model.wte)
    head = model._modules.get("lm_head")
    places: list[tuple[str, nn.Module | None, type[nn.Module]]] = [("wte", model.wte, nn.Embedding)]
    if not model.config.tie_word_embeddings:
        places.append(("lm_head", head, nn.Linear))
    elif head is not None and not isinstance(head, TiedOutputProjection):
        raise ArgumentError(
            f"the vocabulary cannot be resized: lm_head, a {type(head).__name__}, was added beside "
            "a tied embedding; remove it, or give the configuration tie_word_embeddings=False"
        )
    for name, table, kind in places:
        if not isinstance(table, kind) or "weight" not in table._parameters:
            raise ArgumentError(
                f"the vocabulary cannot be resized: {name} is a {type(table).__name__}, and no "
                f"nn.{kind.__name__} with a weight of its own; put that in its place first"
            )
        if hasattr(table.weight, "full_tensor"):
            raise ArgumentError(
                f"the vocabulary cannot be resized: {name}.weight is a shard; resize the model "
                "before it is sharded"
            )
    return [table for _, table, _ in places if table is not None]


def _count(name: str, value: Any) -> int:
    try:
        count = 0 if isinstance(value, bool) else index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ArgumentError(f"{name} is {shown(value)}, and must be a whole number of at least 1")
    return count


def _resize(parameter: nn.Parameter, rows: int, std: float | None) -> None:
    """Change the rows of a parameter (rows, …); new ones are the mean, or drawn with `std`."""
    old = parameter.detach()
    if len(old) == rows:
        return
    new = old.new_empty(rows, *old.shape[1:])
    new[: len(old)] = old[:rows]
    added = new[len(old) :]
    if std is None:
        added[:] = _mean(old)
    elif old.dim() == 1:  # a bias
        added.zero_()
    else:
        added.normal_(std=std)
    parameter.data = new
    parameter.grad = None
    if not parameter.is_inference():
        # Counts as a change, so that logits still to be computed from the old rows are refused.
        torch.autograd.graph.increment_version(parameter)


def _mean(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).mean(0)
