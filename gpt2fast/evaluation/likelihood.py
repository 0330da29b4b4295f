"""Log-likelihoods of tokens under a model, in batches, without the logits of other positions.

Everything that is evaluated comes down to one question: how likely are these tokens after those?
`Scorer.score` answers many at once. Endings that share a context read it once, into a KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DataError
from ..inference.decoding import check_numbers, evaluating
from ..inference.generation import check_vocabulary
from ..inference.packed import PackedGPT2
from ..model import GPT2
from ..nn.kv_cache import KVCache
from ..nn.output import LOGITS_ALONE
from ..ops.backend import statistics_dtype
from ..tokenizer import Tokenizer

BATCH_SIZE = 16

# Most bytes of logits to hold at once.
_CHUNK_BYTES = 1 << 26
# Tokens that pass through the model at once; on a CPU more would only take memory.
_MOST_TOKENS = {"cpu": 4096}
_MOST_TOKENS_ELSEWHERE = 65536


class Request(NamedTuple):
    """A context, and endings to score after it."""

    context: list[int]
    """Token ids, at least one."""
    endings: list[list[int]]
    """Token ids of each ending."""


class Likelihood(NamedTuple):
    """The probabilities that a model gives to the tokens of one ending."""

    logprobs: Tensor
    """(N,) float64 log-probabilities in nats, each after the context and the tokens before it."""
    greedy: Tensor
    """(N,) bool: the token is the likeliest of all."""

    @property
    def total(self) -> float:
        """Log-likelihood of the ending: the sum."""
        return self.logprobs.sum().item()

    @property
    def is_greedy(self) -> bool:
        """True if greedy decoding would write exactly this ending."""
        return bool(self.greedy.all())


class Scorer:
    """A model with its tokenizer, asked for likelihoods.

    Args:
        model, tokenizer: a pair; a tokenizer of transformers or tokenizers will do.
        batch_size: sequences read at once; fewer where they are long. Results do not depend on it
            beyond rounding.
        progress: called with the number of requests answered so far and their total.
    """

    def __init__(
        self,
        model: GPT2 | PackedGPT2,
        tokenizer: Any,
        *,
        batch_size: int = BATCH_SIZE,
        progress: Callable[[int, int], None] | None = None,
    ):
        self.model = model
        self.tokenizer = Tokenizer.of(tokenizer)
        self.batch_size = batch_size
        self._progress = progress
        self._done = self._total = 0

    def encode(self, context: str, ending: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of its ending, as lm-evaluation-harness splits them.

        White space at the end of the context counts to the ending, the two are encoded together,
        and the ending is what comes after as many tokens as the context alone has. An empty
        context becomes the tokenizer's token for that, `start_token_id`.
        """
        bare = context.rstrip()
        context, ending = bare, context[len(bare) :] + ending
        if not context:
            first = self.tokenizer.start_token_id
            if first is None:
                raise DataError(
                    "an example has an empty context, and this tokenizer has no end-of-text token "
                    "to begin with: use a tokenizer that has one, such as GPT-2's"
                )
            return [first], self._bare(ending)
        tokens = self._bare(context)
        return tokens, self._bare(context + ending)[len(tokens) :]

    def _bare(self, text: str) -> list[int]:
        """Its tokens, without those that a tokenizer may put around a text."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def score(self, requests: Sequence[Request]) -> list[list[Likelihood]]:
        """The likelihood of each ending of each request, in their order.

        A context that is too long for the model loses its beginning, for each ending no more than
        that ending needs.

        Raises:
            DataError: an ending is longer than the model's `n_positions`.
            GenerationError: a token outside the vocabulary, or output that is not a number.
        """
        nothing = Likelihood(torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.bool))
        found = [[nothing] * len(request.endings) for request in requests]
        room = self.model.config.n_positions
        alone: list[tuple[int, int]] = []
        together: list[int] = []
        for number, (context, endings) in enumerate(requests):
            longest = max(map(len, endings), default=0)
            if longest > room:
                raise DataError(
                    f"an ending has {longest} tokens, more than this model's n_positions={room}: "
                    "leave the example out, or use a model with a longer context"
                )
            fits = len(context) + longest <= room + 1
            if fits and len(context) > 1 and len(endings) > 1 and all(endings):
                together.append(number)
            else:
                alone += [(number, place) for place, ending in enumerate(endings) if ending]
            for tokens in (context, *endings):
                check_vocabulary(self.model, tokens, "an example", self.tokenizer)
        self._done, self._total = 0, len(alone) + sum(len(requests[n].endings) for n in together)

        def length(item: tuple[int, int]) -> int:
            context, endings = requests[item[0]]
            return min(len(context) + len(endings[item[1]]), room + 1)

        def shape(number: int) -> tuple[int, int]:
            context, endings = requests[number]
            return len(endings), len(context) + max(map(len, endings))

        # The longest first: what does not fit into memory fails at once.
        alone.sort(key=length, reverse=True)
        together.sort(key=shape, reverse=True)
        with torch.inference_mode(), evaluating(self.model):  # type: ignore[arg-type]
            for items in self._batches(alone, length):
                rows = [
                    (requests[number].context, requests[number].endings[place])
                    for number, place in items
                ]
                for (number, place), likelihood in zip(items, self._alone(rows), strict=True):
                    found[number][place] = likelihood
                self._advance(len(items))
            for count, numbers in groupby(together, key=lambda number: shape(number)[0]):
                for batch in self._batches(list(numbers), lambda number: shape(number)[1]):
                    answers = self._together([requests[number] for number in batch], count)
                    for number, likelihoods in zip(batch, answers, strict=True):
                        found[number] = likelihoods
        return found

    def _batches(self, items: list, length: Callable) -> Iterable[list]:
        """Items, the longest first, in groups of `batch_size` or as many as may be read at once."""
        most = _MOST_TOKENS.get(self.model.device.type, _MOST_TOKENS_ELSEWHERE)
        first = 0
        while first < len(items):
            size = max(1, min(self.batch_size, most // length(items[first])))
            yield items[first : first + size]
            first += size

    def _alone(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        """Contexts with one ending each, read in one go."""
        room = self.model.config.n_positions
        tokens = [(context + ending)[-(room + 1) :] for context, ending in rows]
        ids, _ = self._padded([row[:-1] for row in tokens], 0)
        targets, _ = self._padded(
            [
                [-100] * (len(row) - 1 - len(ending)) + ending
                for row, (_, ending) in zip(tokens, rows, strict=True)
            ],
            -100,
        )
        # A token does not see those to its right: padding there needs no mask.
        return self._read(ids, targets, None, None, None)

    def _together(self, requests: Sequence[Request], count: int) -> list[list[Likelihood]]:
        """Requests with `count` endings each: the contexts once, then ending after ending."""
        model = self.model
        # The last token of the context is read with each ending, whose first token it predicts.
        contexts = [context[:-1] for context, _ in requests]
        lengths = torch.tensor([len(context) for context in contexts], device=model.device)
        need = max(len(context) - 1 + max(map(len, endings)) for context, endings in requests)
        dtype = torch.float32 if isinstance(model, PackedGPT2) else None  # its own may be int8
        cache = model.new_cache(len(requests), need, dtype)
        ids, mask = self._padded(contexts, 0)
        if isinstance(model, PackedGPT2):
            model(ids, mask, cache=cache, logits_to_keep=1)
        else:
            model.hidden_states(ids, mask, cache=cache)
        found: list[dict[int, Likelihood]] = [{} for _ in requests]
        # Endings of about the same length together, so that little is padding.
        orders = [_by_length(endings) for _, endings in requests]
        for places in zip(*orders, strict=True):
            cache.lengths = lengths  # forgets the endings before
            endings = [endings[place] for (_, endings), place in zip(requests, places, strict=True)]
            ids, mask = self._padded(
                [
                    [context[-1], *ending[:-1]]
                    for (context, _), ending in zip(requests, endings, strict=True)
                ],
                0,
            )
            targets, _ = self._padded(endings, -100)
            steps = torch.arange(ids.shape[1], device=model.device)
            # Padding may lie past the last position.
            positions = (lengths[:, None] + steps).clamp(max=model.config.n_positions - 1)
            likelihoods = self._read(ids, targets, mask, positions, cache)
            for row, (place, likelihood) in enumerate(zip(places, likelihoods, strict=True)):
                found[row][place] = likelihood
            self._advance(len(requests))
        return [[likelihoods[place] for place in range(count)] for likelihoods in found]

    def _read(
        self,
        ids: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: KVCache | None,
    ) -> list[Likelihood]:
        """Likelihood of the targets (B, T) that are not -100, for each row."""
        if isinstance(self.model, PackedGPT2):
            logprobs, greedy = self._packed(self.model, ids, targets, mask, positions, cache)
        else:
            hidden = self.model.hidden_states(ids, mask, positions, cache)
            wanted = targets >= 0
            logprobs, greedy = _project(self.model, hidden[wanted], targets[wanted])
        check_numbers(logprobs)
        counts = (targets >= 0).sum(1).tolist()
        return [
            Likelihood(*pair)
            for pair in zip(
                logprobs.double().cpu().split(counts), greedy.cpu().split(counts), strict=True
            )
        ]

    def _packed(
        self,
        model: PackedGPT2,
        ids: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        """The same from a model that gives logits only: a few columns of them at a time."""
        if cache is None:
            # Packed kernels read 512 tokens at a time anyway, and a cache a row is smaller.
            rows = [
                self._packed(model, row[None, :length], target[None, :length], None, None, new)
                for row, target in zip(ids, targets, strict=True)
                for length in [int((target >= 0).nonzero()[-1]) + 1]
                for new in [model.new_cache(1, length, torch.float32)]
            ]
            logprobs, greedy = zip(*rows, strict=True)
            return torch.cat(logprobs), torch.cat(greedy)
        found = ids.new_zeros(ids.shape, dtype=torch.float32)
        likeliest = ids.new_zeros(ids.shape, dtype=torch.bool)
        step = max(1, _chunk_rows(model.config.vocab_size, 4) // len(ids))
        for first in range(0, ids.shape[1], step):
            part = slice(first, first + step)
            wanted = targets[:, part] >= 0
            kept = wanted.any(0).nonzero()[:, 0]
            logits = model(
                ids[:, part],
                None if mask is None else mask[:, part],
                None if positions is None else positions[:, part],
                cache=cache,
                logits_to_keep=kept if len(kept) else 1,
                **LOGITS_ALONE,
            ).logits
            if len(kept):
                shown = wanted[:, kept]
                scores = _scores(logits[shown], targets[:, part][:, kept][shown])
                # Row by row, as boolean masks are: the order of `targets[wanted]`.
                found[:, part][wanted], likeliest[:, part][wanted] = scores
        return found[targets >= 0], likeliest[targets >= 0]

    def _padded(self, rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
        """Rows side by side (B, T), and a mask (B, T) of what is not padding."""
        longest = max(map(len, rows))
        padded = [[*row, *[value] * (longest - len(row))] for row in rows]
        lengths = torch.tensor([len(row) for row in rows], device=self.model.device)
        tokens = torch.tensor(padded, device=self.model.device)
        columns = torch.arange(longest, device=self.model.device)
        return tokens, (columns < lengths[:, None]).long()

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def _by_length(endings: Sequence[list[int]]) -> list[int]:
    return sorted(range(len(endings)), key=lambda place: len(endings[place]))


def _project(model: GPT2, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (N,) of targets after hidden states (N, C), and whether each is likeliest."""
    size = _chunk_rows(model.config.vocab_size, hidden.element_size())
    found = [
        _scores(model.project(rows), wanted)
        for rows, wanted in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    logprobs, greedy = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(greedy)


def _scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.to(statistics_dtype(logits.dtype))
    picked = logits.gather(1, targets[:, None])[:, 0]
    return picked - logits.logsumexp(-1), logits.argmax(-1) == targets


def _chunk_rows(vocab_size: int, element_size: int) -> int:
    return max(1, _CHUNK_BYTES // (vocab_size * element_size))
