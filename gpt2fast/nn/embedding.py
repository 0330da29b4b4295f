"""The tables of embeddings."""

from __future__ import annotations

import torch
from torch import nn

from .initialization import Device, Dtype
from .plain import readable


@readable
class Embedding(nn.Embedding):
    """`nn.Embedding` that begins as GPT-2's do.

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
