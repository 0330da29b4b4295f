"""Contrastive search (Su et al., 2022): a likely token whose hidden state is not like those before.

Of the `top_k` likeliest tokens V, the next one is

    argmax over v in V of (1 - alpha) * p(v) - alpha * max over j of cosine(h(v), h(j))

where p is the probability after the processors of scores, h the last hidden state (the output of
the last layer norm), and j runs over all tokens so far, those of the prompt among them. Each
candidate is read as if it were chosen, so that a step reads `top_k` rows for each text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import GenerationError
from ..model import GPT2
from ..nn.output import LOGITS_ALONE
from ..nn.plain import is_unwatched
from ..sampling import SamplingOptions
from .packed import PackedGPT2
from .processors import Processors


class ContrastiveSearch:
    """The next token of every row, chosen after a step that has read the candidates.

    Args:
        model: its modules are called, hooks and all.
        prompts: token ids of each row, at least one.
        steps: maximum of tokens to append to a row.
        options: those with `penalty_alpha` and `top_k`.
        vocab_size: allow only token ids below this.
        processors: applied before the candidates are chosen.
    """

    def __init__(
        self,
        model: GPT2,
        prompts: Sequence[Sequence[int]],
        steps: int,
        options: SamplingOptions,
        vocab_size: int,
        processors: Processors,
    ):
        assert options.penalty_alpha is not None and options.top_k is not None
        self._model, self._processors, self._vocab_size = model, processors, vocab_size
        self._alpha, self._candidates = options.penalty_alpha, min(options.top_k, vocab_size)
        self._filled = self._prompted = longest = max(len(prompt) for prompt in prompts)
        self._tokens = torch.tensor(
            [[-1] * (longest - len(prompt)) + list(prompt) for prompt in prompts],
            device=model.device,
        )
        """(rows, columns) int64: each row's tokens, after -1 as padding."""
        self._tokens = F.pad(self._tokens, (0, steps))
        self._cache = model.new_cache(len(prompts), min(longest + steps, model.config.n_positions))
        hidden, self._following = self._read_prompts()
        self._cache.expand(self._candidates)
        self._directions = F.pad(_directions(hidden), (0, 0, 0, steps))
        """(rows, columns, width) float32: the hidden state of each token, of length 1."""
        self.logits = self._following
        """(rows, vocab): the logits that the newest tokens were chosen from."""

    def next(self, remaining: int) -> list[int]:
        """One more token of each row; at most `remaining` more will be asked for."""
        self.logits = self._following
        history = self._tokens[:, : self._filled]
        scores = self._processors.process(
            self.logits[:, : self._vocab_size].float(), history, history[:, self._prompted :]
        )
        self._processors.check_left(scores, self._filled - self._prompted)
        likely, tokens = scores.softmax(-1).topk(self._candidates)
        hidden, logits = self._states(tokens.flatten()[:, None], None, None)
        directions = _directions(hidden).view(*tokens.shape, -1)
        cosines = directions @ self._directions[:, : self._filled].transpose(1, 2)
        padding = history[:, None] < 0
        penalty = cosines.masked_fill(padding, -math.inf).amax(-1)
        contrast = (1 - self._alpha) * likely - self._alpha * penalty
        banned = scores.gather(1, tokens) == -math.inf
        best = contrast.masked_fill(banned, -math.inf).argmax(-1)

        rows = torch.arange(len(tokens), device=tokens.device)
        read = rows * self._candidates + best
        self._cache.repeat_newest(read.repeat_interleave(self._candidates))
        self._following = logits[read]
        self._tokens[:, self._filled] = tokens[rows, best]
        self._directions[:, self._filled] = directions[rows, best]
        self._filled += 1
        return self._tokens[:, self._filled - 1].tolist()

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows."""
        kept = torch.tensor(rows, device=self._tokens.device)
        self._tokens, self._directions = self._tokens[kept], self._directions[kept]
        self._following = self._following[kept]
        copies = torch.arange(self._candidates, device=kept.device)
        self._cache.reorder((kept[:, None] * self._candidates + copies).flatten())

    def step_bytes(self) -> int:
        """Bytes of weights and of cached keys and values that one step reads."""
        entries = int(self._cache.lengths.sum())
        return self._model.weight_bytes + entries * self._cache.entry_bytes

    def is_complete(self, place: int) -> bool:
        """False: no grammar is followed."""
        return False

    def close(self) -> None:
        """Nothing is to be given back."""

    def _read_prompts(self) -> tuple[Tensor, Tensor]:
        tokens = self._tokens[:, : self._filled]
        real = tokens >= 0
        if bool(real.all()):
            return self._states(tokens, None, None)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        return self._states(tokens.clamp(min=0), real.long(), positions)

    def _states(
        self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (B, T, width), and the logits (B, vocab) after the last column."""
        model, cache = self._model, self._cache
        if is_unwatched(model, GPT2):
            hidden = model.hidden_states(tokens, mask, positions, cache)
            return hidden, model.project(hidden[:, -1:])[:, -1]
        asked = {**LOGITS_ALONE, "output_hidden_states": [-1]}
        output = model(tokens, mask, positions, cache=cache, logits_to_keep=1, **asked)
        return output.hidden_states[-1], output.logits[:, -1]


def check_contrastive(model: GPT2 | PackedGPT2, options: SamplingOptions, use_cache: bool) -> None:
    """Refuse contrastive search, where it is asked for, if a model has no hidden states to compare.

    Raises:
        GenerationError: the weights are packed, or there is to be no cache.
    """
    if not options.contrastive:
        return
    asked = f"penalty_alpha is {options.penalty_alpha}"
    if not isinstance(model, GPT2):
        raise GenerationError(
            f"{asked}: contrastive search compares hidden states, which packed and quantized "
            "weights do not give: generate with the GPT2 that they were made of, or load the model "
            "without pack and quantize"
        )
    if not use_cache:
        raise GenerationError(
            f"{asked}, and use_cache=False: contrastive search reads all candidates beside one "
            "cache; leave use_cache out"
        )


def _directions(hidden: Tensor) -> Tensor:
    """(..., width) float32 vectors of length 1."""
    return F.normalize(hidden.float(), dim=-1)
