"""Sequences that packed steps read, in rows of caches or in pages of pools, for tests of both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2fast import ops
from gpt2fast.ops.packed import MatrixFormat, ModelShape, PackedWeights, QuantizedMatrix


def random_matrix(form: MatrixFormat, inputs: int, outputs: int) -> Tensor | QuantizedMatrix:
    """A matrix in this format."""
    if not form.group:
        matrix = torch.randn(inputs, outputs) / math.sqrt(inputs)
        return matrix.to(getattr(torch, form.name))
    most = 127 if form.name == "int8" else 7
    q = torch.randint(-most, most + 1, (inputs, outputs)).to(torch.int8)
    scales = (0.5 + torch.rand(-(-inputs // form.group), outputs)) / most / math.sqrt(inputs)
    return QuantizedMatrix(q, scales.half(), 8 if most == 127 else 4, form.group)


def random_weights(
    form: MatrixFormat,
    heads: int,
    size: int,
    inner: int,
    vocab: int,
    tied: bool,
    positions: int = 128,
) -> PackedWeights:
    """Weights of two layers with `heads` heads of `size`."""
    width = heads * size
    shape = ModelShape(heads, width, inner, vocab, positions, "relu", 1e-2, (0.4, 0.3), tied)
    weights = PackedWeights(shape, dict.fromkeys(shape.matrices(), form))
    for name, (inputs, outputs) in shape.matrices().items():
        weights.put(name, random_matrix(form, inputs, outputs))
    for name, dims in shape.vectors().items():
        values = torch.randn(dims)
        if "c_attn" in name:  # the last element, and the last head, are larger than the others
            values.view(3, heads, size)[..., -1] += 3.0
            values.view(3, heads, size)[:, -1] *= 4.0
        weights.put(name, values)
    return weights


class Sequences:
    """Texts that packed steps read piece by piece.

    Args:
        weights: of the model.
        dtype: of keys and values.
        count: texts.
        entries: room for each.
        page: entries of a page; None: every text has a row of its own.
        shared: entries, of whole pages, that the texts begin with and have in common: only the
            first text's pages hold them.
        seed: of the order of the pages.
    """

    def __init__(
        self,
        weights: PackedWeights,
        dtype: torch.dtype,
        count: int,
        entries: int,
        page: int | None = None,
        shared: int = 0,
        seed: int = 0,
    ):
        self.weights = weights
        self.lengths = [0] * count
        shape = weights.shape
        layers, head = len(shape.scales), (shape.n_head, shape.width // shape.n_head)
        self.pages: Tensor | None = None
        if page is None:
            size = (layers, count, entries, *head)
        else:
            each, common = -(-entries // page), shared // page
            total = count * (each - common) + common
            size = (layers, total + 2, page, *head)
            order = torch.randperm(total + 2, generator=torch.Generator().manual_seed(seed))
            first, own = order[:common], order[common:total].view(count, each - common)
            self.pages = torch.cat([first.expand(count, common), own], 1)
            self.pages = torch.nn.functional.pad(self.pages, (0, 1), value=-1)
        filler = 77 if dtype == torch.int8 else math.nan
        self.k, self.v = (torch.full(size, filler, dtype=dtype) for _ in "kv")
        self.k_scales = self.v_scales = None
        if dtype == torch.int8:
            self.k_scales, self.v_scales = (torch.full(size[:-1], math.nan) for _ in "kv")

    def step(
        self,
        news: dict[int, Tensor],
        singly: Sequence[bool] | None = None,
        outputs: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits after new tokens of some texts: after all of them, or after those at `outputs`."""
        texts = list(news)
        counts = [len(tokens) for tokens in news.values()]
        tokens = torch.cat(list(news.values()))
        before = [self.lengths[text] for text in texts]
        positions = [torch.arange(n, n + count) for n, count in zip(before, counts, strict=True)]
        rows = torch.tensor(texts)
        logits = ops.packed_step(
            self.weights,
            self.k,
            self.v,
            tokens,
            torch.cat(positions),
            torch.tensor([0, *counts]).cumsum(0),
            rows if self.pages is None else torch.arange(len(texts)),
            torch.tensor(before),
            torch.arange(len(tokens)) if outputs is None else torch.tensor(outputs),
            k_scales=self.k_scales,
            v_scales=self.v_scales,
            pages=None if self.pages is None else self.pages[rows],
            singly=None if singly is None else torch.tensor(singly),
        )
        for text, count in zip(texts, counts, strict=True):
            self.lengths[text] += count
        return logits

    def share(self, entries: int) -> None:
        """Count the first text's first entries as all texts'."""
        self.lengths = [max(length, entries) for length in self.lengths]
