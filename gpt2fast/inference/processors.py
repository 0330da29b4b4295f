"""Processors of scores that the ops do not have, and the order of all of them in a step.

    scores = logits that a grammar allows + bias -> repetition penalty, no repeated n-grams
             -> frequency and presence penalty -> bad words -> no end before min_new_tokens
             -> the user's processors
    drawn:   -> temperature -> top-k -> top-p -> min-p -> typical-p -> epsilon -> eta

The order is transformers'; what it lacks stands where OpenAI's API and vLLM have it. Greedy
decoding and beam search do not draw, and end there. Epsilon and eta cutoff: Hewitt et al., 2022.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .. import ops
from ..errors import GenerationError
from ..ops.sampling import ban_masked, process
from ..sampling import STEPWISE, SamplingOptions
from .callables import Callables
from .stopping import StopCriteria


class Processors:
    """All processors of a request.

    Args:
        options: which ones.
        criteria: ends of texts, which `min_new_tokens` puts off and `bad_words_ids` spares.
        callables: those of the user's.
        vocab_size: number of tokens that have a score.
        device: of the scores.
    """

    def __init__(
        self,
        options: SamplingOptions,
        criteria: StopCriteria,
        callables: Callables,
        vocab_size: int,
        device: torch.device,
    ):
        self._of_history = options.history_processors()
        self._warpers = {
            name: value
            for name, value in options.processors().items()
            if name not in self._of_history
        }
        on = {name: option.argument(getattr(options, name)) for name, option in STEPWISE.items()}
        self._frequency, self._presence = on["frequency_penalty"], on["presence_penalty"]
        self._epsilon, self._eta = on["epsilon_cutoff"], on["eta_cutoff"]
        if not options.samples:
            self._epsilon = self._eta = 0.0
        self._callables = callables
        self._min_new_tokens = options.min_new_tokens or 0

        def bias(biases: Mapping[tuple[int, ...], float]) -> SequenceBias | None:
            known = {tokens: x for tokens, x in biases.items() if max(tokens) < vocab_size}
            return SequenceBias(known, device) if known else None

        self._bias = bias({(token,): x for token, x in (options.logit_bias or {}).items()})
        # As in transformers, an end token is no bad word.
        words = [tuple(word) for word in options.bad_words_ids or []]
        ends = [(token,) for token in criteria.eos]
        self._bad_words = bias({word: -math.inf for word in words if word not in ends})
        stops = [*ends, *map(tuple, criteria.sequences)] if self._min_new_tokens else []
        self._ends = bias(dict.fromkeys(stops, -math.inf))
        self._bans = self._bad_words is not None or self._ends is not None
        self.stepwise = bool(
            callables.processors or self._bias or self._bad_words or self._ends
            or self._frequency or self._presence or self._epsilon or self._eta
        )  # fmt: skip
        """True if there are any that the ops do not have: every step is taken by itself then."""

    def process(self, scores: Tensor, history: Tensor, generated: Tensor) -> Tensor:
        """The scores up to the user's processors.

        Args:
            scores: (rows, vocab) float32; logits, or log-probabilities in beam search.
            history: (rows, S) int64, each row's tokens, after -1 as padding.
            generated: (rows, N) int64, the last columns of `history`, which follow the prompts.

        Returns:
            (rows, vocab) float32; -inf marks a banned token.
        """
        if self._bias is not None:
            scores = self._bias(scores, history)
        scores = process(scores, history, **self._of_history)
        if self._frequency or self._presence:
            scores = penalize_generated(scores, generated, self._frequency, self._presence)
        if self._bad_words is not None:
            scores = self._bad_words(scores, history)
        if self._ends is not None and generated.shape[1] < self._min_new_tokens:
            # A stop sequence counts from the first new token on.
            scores = self._ends(scores, generated)
        if self._callables.processors:
            scores = self._callables.process(history, scores.clone())
        return scores

    def check_left(self, scores: Tensor, generated: int, masked: bool = False) -> None:
        """Refuse scores (rows, vocab) after `generated` new tokens that leave none of a row.

        Args:
            masked: a grammar has banned tokens, too.

        Raises:
            GenerationError: bad words, and what else bans tokens, ban all.
        """
        may_ban = self._bans or self._callables.processors or masked
        if may_ban and not bool((scores.amax(-1) > -math.inf).all()):  # NaN is no more either
            raise GenerationError(
                f"no token is left to choose after {generated} new ones: bad_words_ids, "
                "min_new_tokens, no_repeat_ngram_size and processors of scores ban every one"
                f"{' that the grammar allows' if masked else ''}, or a "
                "processor made NaN of a score; take fewer bad words, or a smaller min_new_tokens"
            )

    def choose(
        self,
        logits: Tensor,
        history: Tensor,
        generated: Tensor,
        uniform: Tensor | None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """The next token (rows,) of each row, after all processors.

        Args:
            logits: (rows, vocab).
            history, generated: as in `process`.
            uniform, token_mask: as in `ops.sample`; no processor brings a masked token back.

        Raises:
            GenerationError: bad words, and what else bans tokens, leave none of a row.
        """
        scores = logits.float()
        if token_mask is not None:
            scores = ban_masked(scores, token_mask)
        scores = self.process(scores, history, generated)
        self.check_left(scores, generated.shape[1], masked=token_mask is not None)
        if uniform is None or not (self._epsilon or self._eta):
            return ops.sample(scores, history, uniform, token_mask=token_mask, **self._warpers)
        if token_mask is not None:
            scores = ban_masked(scores, token_mask)
        scores = process(scores, history, **self._warpers)
        if self._epsilon:
            scores = cut_epsilon(scores, self._epsilon)
        if self._eta:
            scores = cut_eta(scores, self._eta)
        return ops.sample(scores, history, uniform)


class SequenceBias:
    """Adds a number to the score of each token that would complete one of some sequences.

    Args:
        biases: by sequence, of at least one token each.
        device: of the scores.
    """

    def __init__(self, biases: Mapping[tuple[int, ...], float], device: torch.device):
        self._groups = []
        for length in sorted({len(tokens) for tokens in biases}):
            group = [tokens for tokens in biases if len(tokens) == length]
            begins = torch.tensor([tokens[:-1] for tokens in group], device=device).long()
            lasts = torch.tensor([tokens[-1] for tokens in group], device=device)
            values = torch.tensor(
                [biases[tokens] for tokens in group], dtype=torch.float32, device=device
            )
            self._groups.append((begins, lasts, values))

    def __call__(self, scores: Tensor, history: Tensor) -> Tensor:
        """Scores (rows, vocab) with the numbers added, for rows that end as `history` does."""
        total = torch.zeros_like(scores)
        for begins, lasts, values in self._groups:
            before = begins.shape[1]
            if before > history.shape[1]:
                continue
            end = history[:, None, history.shape[1] - before :]
            completes = (end == begins).all(-1).expand(len(scores), -1)
            total.index_add_(1, lasts, torch.where(completes, values, 0.0))
        return scores + total


def penalize_generated(
    scores: Tensor, generated: Tensor, frequency: float, presence: float
) -> Tensor:
    """Subtract `frequency` for each time that a token was generated, and `presence` if it was.

    Args:
        scores: (rows, vocab) float32.
        generated: (rows, N) int64, ids of the vocabulary.
    """
    counts = torch.zeros_like(scores).scatter_add_(
        1, generated, torch.ones_like(generated, dtype=scores.dtype)
    )
    return scores - frequency * counts - presence * (counts > 0).to(scores.dtype)


def cut_epsilon(scores: Tensor, epsilon: float) -> Tensor:
    """Ban the tokens with a probability below `epsilon`, but for the likeliest ones."""
    return _ban_below(scores, scores.softmax(-1), epsilon)


def cut_eta(scores: Tensor, eta: float) -> Tensor:
    """Ban the tokens with a probability below min(eta, sqrt(eta) * exp(-entropy)), but for the
    likeliest ones."""
    probabilities = scores.softmax(-1)
    limit = torch.tensor(eta, dtype=scores.dtype, device=scores.device)
    relative = limit.sqrt() * torch.exp(-torch.special.entr(probabilities).sum(-1, keepdim=True))
    return _ban_below(scores, probabilities, torch.minimum(limit, relative))


def _ban_below(scores: Tensor, probabilities: Tensor, limit: float | Tensor) -> Tensor:
    unlikely = (probabilities < limit) & (scores < scores.amax(-1, keepdim=True))
    return scores.masked_fill(unlikely, -math.inf)


def check_ids(options: SamplingOptions, vocab_size: int) -> None:
    """Refuse token ids in options that a model does not have.

    Raises:
        GenerationError: names the option, the first such id and the limit.
    """
    named: dict[str, Iterable[Sequence[int]]] = {
        "logit_bias": [[token] for token in options.logit_bias or {}],
        "bad_words_ids": options.bad_words_ids or [],
    }
    for name, sequences in named.items():
        for token in (token for sequence in sequences for token in sequence):
            if token >= vocab_size:
                raise GenerationError(
                    f"{name} has the token id {token}; ids of this model go from 0 to "
                    f"{vocab_size - 1}: leave it out, or take the tokenizer of the model"
                )
