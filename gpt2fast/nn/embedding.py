"""Embedding tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from .initialization import Device, Dtype
from .plain import readable


@readable
class Embedding(nn.Embedding):
    """`nn.Embedding` with GPT-2's initialization.

    Args:
        num_embeddings, embedding_dim: rows of the table, and their size.
        std: standard deviation of the initial weights, which the caller draws.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        std: float = 0.02,
        *,
        device: Device = None,
        dtype: Dtype = None,
    ):
        table = torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        super().__init__(num_embeddings, embedding_dim, _weight=table)
        self.std = std

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, std^2)."""
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=self.std)


def table_of(embedding: nn.Module, shape: tuple[int, int]) -> Tensor:
    """The table of this shape inside `embedding`, which an output projection is tied to.

    If the embedding is wrapped, parametrized or pruned, the projection still uses the table itself,
    as in transformers.

    Raises:
        ArgumentError: there is no such table, or more than one.
    """
    if "weight" in embedding._parameters:
        return embedding.weight  # type: ignore[return-value]
    if isinstance(embedding, nn.Embedding):
        changes: Any = getattr(embedding, "parametrizations", {})
        table = embedding._parameters.get("weight_orig")
        if "weight" in changes:
            table = changes["weight"]._parameters.get("original")
        return embedding.weight if table is None else table
    tables = [weight for weight in embedding.parameters() if weight.shape == shape]
    if len(tables) != 1:
        # Not an AttributeError, which nn.Module would replace by its own.
        raise ArgumentError(
            f"wte is a {type(embedding).__name__} with {len(tables)} parameters of the shape "
            f"{shape}, and the output projection is tied to one: give the configuration "
            "tie_word_embeddings=False, or keep the embedding's weight inside"
        )
    return tables[0]
