"""What a model makes of given texts: log-probabilities of tokens, and vectors of whole texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import GenerationError
from ..model import GPT2
from .decoding import check_numbers, evaluating
from .teacher_forcing import score_sequences

POOLINGS = ("mean", "last")

# Tokens that pass through the model at once, unless a single text has more.
_MOST_TOKENS = 4096


@dataclass
class TextScores:
    """How likely a model finds a text."""

    token_ids: list[int]
    """The text's tokens."""
    logprobs: list[float | None] = field(default_factory=list)
    """Log-probability of each token after those before it, in nats; None for a first one that
    nothing comes before."""

    @property
    def total(self) -> float:
        """The sum of the log-probabilities."""
        return sum(each for each in self.logprobs if each is not None)


def score_texts(
    model: GPT2, texts: Sequence[list[int]], first: int | None, stride: int | None
) -> list[TextScores]:
    """Score the tokens of texts of any length.

    Args:
        model: what scores.
        texts: token ids of each.
        first: a token to read before each text, which is not scored; None: none.
        stride: a text of more than n_positions tokens is read window by window, each of which
            scores so many tokens, the first as many as it holds: every token beyond that sees
            n_positions - stride others at least. None: half of n_positions.

    Raises:
        GenerationError: a stride that is not in 1 .. n_positions.
    """
    room = model.config.n_positions
    stride = max(1, room // 2) if stride is None else stride
    if type(stride) is not int or not 1 <= stride <= room:
        raise GenerationError(
            f"stride is {stride!r:.80}; it must be a whole number from 1 to the model's "
            f"n_positions, {room}"
        )
    before = [] if first is None else [first]
    windows: list[list[int]] = []
    begins: list[int] = []
    counts = []
    for text in texts:
        pieces = list(_windows([*before, *text], room, stride))
        counts.append(len(pieces))
        for window, begin in pieces:
            windows.append(window)
            begins.append(begin)
    scores = score_sequences(model, windows, 0, begins)
    found = []
    for text, count in zip(texts, counts, strict=True):
        logprobs: list[float | None] = [None] if text and first is None else []
        for _ in range(count):
            logprobs += next(scores).logprobs
        found.append(TextScores(text, logprobs))
    return found


def _windows(tokens: list[int], room: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Windows of at most room + 1 tokens, and the place of the first one that each scores."""
    end = 1
    while end < len(tokens):
        new = room if end == 1 else stride
        scored = end
        end = min(end + new, len(tokens))
        begin = max(0, end - room - 1)
        yield tokens[begin:end], scored - begin


def embed_texts(model: GPT2, texts: Sequence[list[int]], pooling: str) -> Tensor:
    """(N, width) float32: a vector for each text, of the model's last hidden states.

    Args:
        model: what reads.
        texts: token ids of each, at least one and at most n_positions.
        pooling: "mean" over the text's tokens, or the state of its "last" one.

    Raises:
        GenerationError: an empty or too long text, an unknown pooling, a packed model, or hidden
            states that are not numbers.
    """
    if pooling not in POOLINGS:
        raise GenerationError(f"pooling is {pooling!r:.80}; choose one of {', '.join(POOLINGS)}")
    if not isinstance(model, GPT2):
        raise GenerationError(
            "packed and quantized models have no hidden states to read: load the model without "
            "pack and quantize"
        )
    room = model.config.n_positions
    for number, tokens in enumerate(texts, start=1):
        if not 1 <= len(tokens) <= room:
            raise GenerationError(
                f"text {number} has {len(tokens)} tokens; a vector is made of 1 to the model's "
                f"n_positions, {room}: " + ("cut it" if tokens else "leave it out")
            )
    vectors = torch.empty(len(texts), model.config.n_embd)
    with torch.inference_mode(), evaluating(model):
        for rows in _batches(texts):
            longest = max(len(texts[row]) for row in rows)
            # A token does not see those to its right: padding there needs no mask.
            padded = [texts[row] + [0] * (longest - len(texts[row])) for row in rows]
            hidden = model.hidden_states(torch.tensor(padded, device=model.device)).float()
            for row, states in zip(rows, hidden, strict=True):
                real = states[: len(texts[row])]
                check_numbers(real)
                vectors[row] = real.mean(0) if pooling == "mean" else real[-1]
    return vectors.clone()  # not a tensor of inference mode


def _batches(texts: Sequence[list[int]]) -> Iterator[list[int]]:
    """Indices of the texts of each batch, those of like length together."""
    rows: list[int] = []
    for row in sorted(range(len(texts)), key=lambda row: len(texts[row])):
        if rows and (len(rows) + 1) * len(texts[row]) > _MOST_TOKENS:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows
