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


def rounded_inputs(x: Tensor, form: MatrixFormat) -> Tensor:
    """x (N, K) in float64 as a product with a matrix of this format takes it."""
    if form.name in ("float32", "float16"):
        return x
    if form.name == "bfloat16":
        return x.float().bfloat16().double()
    padded = torch.nn.functional.pad(x, (0, form.padded(x.shape[1]) - x.shape[1]))
    groups = padded.view(len(x), -1, form.group)
    factors = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((groups / factors).round() * factors).view(len(x), -1)[:, : x.shape[1]]


def rounded_entries(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values (T, H, D) in float64 as a cache of this dtype holds them."""
    if dtype == torch.int8:
        factors = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
        return (x / factors).round() * factors
    return x.float().to(dtype).double()


def exact_logits(weights: PackedWeights, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, V) after each of `tokens`, in float64, with a cache of `dtype`."""
    shape, form = weights.shape, next(iter(weights.formats.values()))

    def get(name: str) -> Tensor:
        found = weights.get(name)
        found = found.dequantize() if isinstance(found, QuantizedMatrix) else found
        return found.double()

    def product(x: Tensor, name: str) -> Tensor:
        return rounded_inputs(x, form) @ get(f"{name}.weight") + get(f"{name}.bias")

    def norm(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.layer_norm(
            x, (shape.width,), get(f"{name}.weight"), get(f"{name}.bias"), shape.eps
        )

    x = get("wte.weight").t()[tokens] + get("wpe.weight")[: len(tokens)]
    for layer, scale in enumerate(shape.scales):
        block = f"h.{layer}"
        qkv = product(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        q, k, v = qkv.view(len(tokens), 3, shape.n_head, -1).unbind(1)
        k, v = rounded_entries(k, dtype), rounded_entries(v, dtype)
        scores = torch.einsum("thd,shd->hts", q, k) * scale
        hidden = torch.ones(len(tokens), len(tokens)).triu(1).bool()
        attended = torch.einsum(
            "hts,shd->thd", scores.masked_fill(hidden, -math.inf).softmax(-1), v
        )
        x = x + product(attended.reshape(len(tokens), -1), f"{block}.attn.c_proj")
        inner = product(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc").relu()
        x = x + product(inner, f"{block}.mlp.c_proj")
    name = "wte.weight" if shape.tied else "lm_head.weight"
    return rounded_inputs(norm(x, "ln_f"), form) @ get(name)


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
