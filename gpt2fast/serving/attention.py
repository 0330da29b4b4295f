"""The attention weights of one head, for the page: what each token of a text looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import GenerationError
from ..inference.decoding import check_numbers, evaluating
from ..inference.packed import PackedGPT2
from ..model import GPT2
from ..nn import Block, CausalSelfAttention
from ..nn.inputs import check_positions, check_tokens
from ..ops.packed import PackedWeights, QuantizedMatrix
from ..tokenizer import Tokenizer

MOST_ROWS = 256
"""Tokens, the newest of a text, whose weights are returned: their number grows with its square."""
_DIGITS = 5


def attention_response(
    model: GPT2 | PackedGPT2, tokenizer: Tokenizer, tokens: Sequence[int], layer: int, head: int
) -> dict[str, Any]:
    """What the server answers when it is asked for attention.

    Args:
        model: what reads the text.
        tokenizer: the model's.
        tokens: ids of the text, at least one and at most `n_positions`.
        layer, head: which attention, counted from 0.

    Returns:
        `tokens`: the text of each token, which joined are the text: a character of several tokens
        stands with the last of them. `weights`: for each of the newest `MOST_ROWS` tokens its
        weights to the tokens 0 .. itself, which add up to 1 but for rounding. `layers` and
        `heads`: how many the model has.

    Raises:
        GenerationError: no tokens or too many, one that is not in the vocabulary, or a layer or
            head that the model does not have.
        TokenizerError: a token that the tokenizer does not know.
    """
    weights = attention_weights(model, tokens, layer, head)
    first = len(tokens) - len(weights)
    decoder = tokenizer.decoder()
    texts = [decoder.push(token) for token in tokens]
    texts[-1] += decoder.flush()
    return {
        "tokens": texts,
        "weights": [
            [round(weight, _DIGITS) for weight in row[: first + place + 1]]
            for place, row in enumerate(weights.tolist())
        ],
        "layers": model.config.n_layer,
        "heads": model.config.n_head,
    }


def attention_weights(
    model: GPT2 | PackedGPT2, tokens: Sequence[int], layer: int, head: int
) -> Tensor:
    """The weights of one head, from the newest tokens of a text to all of its tokens.

    A packed model's are those of its weights in float32, one layer of which is unpacked at a time:
    kernels for quantized weights round what they multiply, too, and may differ by as much.

    Args:
        model: what reads the text.
        tokens: T ids, at least one and at most `n_positions`.
        layer, head: which attention, counted from 0.

    Returns:
        (min(T, MOST_ROWS), T) float32; zero at tokens that follow the one that looks.

    Raises:
        GenerationError: no tokens or too many, one that is not in the vocabulary, a layer or head
            that the model does not have, an attention that is not GPT-2's own, or weights that are
            not numbers.
    """
    config = model.config
    _check_index("layer", layer, config.n_layer)
    _check_index("head", head, config.n_head)
    if not tokens:
        raise GenerationError("attention is that of a text: give at least one token")
    ids = torch.tensor(tokens, device=model.device)
    positions = torch.arange(len(ids), device=model.device)
    check_tokens(config, ids)
    check_positions(config, positions)
    with torch.inference_mode(), evaluating(model):
        x, blocks = _unpacked(model, ids) if isinstance(model, PackedGPT2) else _open(model, ids)
        for _ in range(layer):
            x = next(blocks)(x)
        weights = _head_weights(next(blocks), x, head)
    check_numbers(weights)
    return weights


def _check_index(name: str, value: int, count: int) -> None:
    if type(value) is not int or not 0 <= value < count:
        raise GenerationError(
            f"{name} is {value!r:.80}; this model has {count}, so it is a whole number from 0 to "
            f"{count - 1}"
        )


def _open(model: GPT2, ids: Tensor) -> tuple[Tensor, Iterator[Block]]:
    """(1, T, width) embeddings of a text, and the blocks that read them."""
    positions = torch.arange(len(ids), device=ids.device)
    return model.wte(ids[None]) + model.wpe(positions[None]), iter(model.blocks)


def _unpacked(model: PackedGPT2, ids: Tensor) -> tuple[Tensor, Iterator[Block]]:
    """As `_open`, in float32; each block is valid until the next one is asked for."""
    weights = model.weights
    places = cast("Tensor", weights.get("wpe.weight"))  # positions are never quantized
    x = weights.columns("wte.weight", ids).t() + places[: len(ids)]
    return x[None], _unpacked_blocks(weights)


def _unpacked_blocks(weights: PackedWeights) -> Iterator[Block]:
    shape = weights.shape
    for layer, scale in enumerate(shape.scales):
        block = Block(
            shape.width, shape.n_head, shape.inner_width, shape.activation,
            scale=scale, eps=shape.eps, device="meta",
        )  # fmt: skip
        stored = {name: weights.get(f"h.{layer}.{name}") for name, _ in block.named_parameters()}
        block.load_state_dict(
            {
                name: value.dequantize() if isinstance(value, QuantizedMatrix) else value.float()
                for name, value in stored.items()
            },
            assign=True,
        )
        yield block.eval()


def _head_weights(block: Block, x: Tensor, head: int) -> Tensor:
    """(rows, T) weights of one head of a block that reads x (1, T, width)."""
    attention: object = block.attn
    if not isinstance(attention, CausalSelfAttention):
        raise GenerationError(
            f"the attention here is a {type(attention).__name__}, whose weights are not known"
        )
    time = x.shape[1]
    qkv = attention.c_attn(block.ln_1(x)).float().view(time, 3, attention.heads, -1)
    q, k = qkv[-MOST_ROWS:, 0, head], qkv[:, 1, head]
    scores = q @ k.t() * attention.scale
    last = torch.arange(time, device=x.device)
    unseen = last > last[-MOST_ROWS:, None]
    return scores.masked_fill(unseen, -torch.inf).softmax(-1)
