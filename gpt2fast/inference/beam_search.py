"""Beam search, step by step as transformers does it, so that both return the same tokens.

Each prompt keeps `num_beams` running beams and the `num_beams` best finished ones. A step extends
the running beams by every token, takes the best candidates, moves those that end among the first
`num_beams` to the finished ones, and runs on with the best of the others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import GPT2
from ..sampling import SamplingOptions
from .callables import NONE, Callables
from .decoding import Timing, check_numbers, evaluating
from .engine import DecodeState
from .processors import Processors
from .stopping import StopCriteria

_NEVER = -1.0e9
"""Score that rules a candidate out; finite, as in transformers, so that ties break alike."""


class Beam(NamedTuple):
    """A continuation."""

    tokens: list[int]
    """With its end token, if it has one."""
    reason: str
    """Reason for its end, as in `Step`."""


@torch.inference_mode()
def beam_search(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    options: SamplingOptions,
    criteria: StopCriteria,
    *,
    use_cache: bool = True,
    vocab_size: int | None = None,
    timing: Timing | None = None,
    callables: Callables = NONE,
) -> list[Beam]:
    """The best continuations of every prompt.

    Args:
        limits: maximum of new tokens for each prompt, at least 1.
        vocab_size: allow only token ids below this; None allows all.
        timing: filled in as the search goes on.
        callables: functions of the user's to call in each step.

    Returns:
        For each prompt its `num_return_sequences` best continuations, the best one first.
    """
    began = time.perf_counter()
    copies = options.num_return_sequences
    timing = Timing() if timing is None else timing
    best: list[list[Beam]] = [[] for _ in prompts]
    with evaluating(model):
        start = time.perf_counter()
        state = DecodeState(model, prompts, max(limits), use_cache=use_cache)
        logits = state.read()
        check_numbers(logits)
        state.expand(options.num_beams)
        logits = logits.repeat_interleave(options.num_beams, dim=0)
        size = model.config.vocab_size if vocab_size is None else vocab_size
        processors = Processors(options, criteria, callables, size, logits.device)
        search = _Search(prompts, limits, options, criteria, callables, model.device)
        searched = list(range(len(prompts)))
        while True:
            scores = processors.process(
                logits[:, :size].float().log_softmax(-1), state.history, state.generated
            )
            if options.max_time is not None:
                search.time_is_over = time.perf_counter() - began > options.max_time
            origins = search.extend(scores)
            ended = search.ended()
            seconds = time.perf_counter() - start
            if search.length == 1:
                timing.add_prefill(seconds, prompts)
            else:
                timing.add_step(seconds, origins.numel(), state.step_bytes())
            start = time.perf_counter()
            for index, prompt in enumerate(searched):
                if ended[index]:
                    best[prompt] = search.best(index, copies)
            live = [index for index, end in enumerate(ended) if not end]
            if not live:
                return [continuation for found in best for continuation in found]
            if len(live) < len(searched):
                searched = [searched[index] for index in live]
                kept = torch.tensor(live, device=model.device)
                search.keep(kept)
                origins = origins[kept]
            state.keep(origins.flatten())
            logits = state.append(search.last_tokens())


class _Search:
    """Running and finished beams of every prompt; all tensors are (prompts, beams, …)."""

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        limits: Sequence[int],
        options: SamplingOptions,
        criteria: StopCriteria,
        callables: Callables,
        device: torch.device,
    ):
        prompts, beams = len(texts), options.num_beams
        self.options, self.criteria, self.callables = options, criteria, callables
        self.texts, self.limits = list(texts), list(limits)
        self.length = 0
        self.time_is_over = False
        """Every text ends with the next step."""
        shape = (prompts, beams, max(limits))
        self.running = torch.zeros(shape, dtype=torch.int64, device=device)
        self.running_scores = torch.zeros(prompts, beams, dtype=torch.float32, device=device)
        # All beams are equal at first, so only the first one may be extended in the first step.
        self.running_scores[:, 1:] = _NEVER
        self.finished = self.running.clone()
        self.finished_lengths = torch.zeros(prompts, beams, dtype=torch.int64, device=device)
        self.finished_scores = torch.full_like(self.running_scores, _NEVER)
        self.is_finished = torch.zeros(prompts, beams, dtype=torch.bool, device=device)
        # Set by each step: true where a running beam may still get better than a finished one.
        self.improvable = torch.ones(prompts, dtype=torch.bool, device=device)

    def extend(self, scores: Tensor) -> Tensor:
        """One step, from the scores (prompts * beams, vocab) of the next tokens.

        Returns:
            (prompts, beams): the row of `scores` that each running beam continues.
        """
        prompts, beams = self.running_scores.shape
        vocab_size = scores.shape[-1]
        totals = scores.view(prompts, beams, vocab_size) + self.running_scores[..., None]
        count = min(max(2, 1 + len(self.criteria.eos)) * beams, beams * vocab_size)
        candidate_scores, flat = totals.view(prompts, -1).topk(count)
        origin = flat // vocab_size
        candidates = _take(self.running, origin)
        candidates[:, :, self.length] = flat % vocab_size
        self.length += 1
        ends = self._ends(candidates)

        running_scores = candidate_scores + ends.float() * _NEVER
        chosen = running_scores.topk(beams).indices
        self.running = _take(candidates, chosen)
        self.running_scores = running_scores.gather(1, chosen)
        self._finish(candidates, candidate_scores, ends)
        self._look_ahead()
        row = torch.arange(prompts, device=flat.device)[:, None] * beams
        return row + origin.gather(1, chosen)

    def ended(self) -> list[bool]:
        """For each prompt, True if its search is over."""
        over = ~self.improvable
        if self.options.early_stopping is True:
            over |= self.is_finished.all(dim=1)
        return [
            end or self.time_is_over or self.length == limit
            for end, limit in zip(over.tolist(), self.limits, strict=True)
        ]

    def best(self, prompt: int, count: int) -> list[Beam]:
        """The prompt's best finished continuations."""
        lengths = self.finished_lengths[prompt, :count].tolist()
        found = self.finished[prompt, :count].tolist()
        beams = []
        for row, length in zip(found, lengths, strict=True):
            tokens = row[:length]
            # No token at all where every one is banned, by n-grams for example.
            reason = self.criteria.reason(tokens) if tokens else "length"
            if reason is None and length == self.limits[prompt]:
                reason = "length"
            elif reason is None:
                over = self.time_is_over and length == self.length
                reason = "time" if over else "stop"  # by a criterion of the user's
            beams.append(Beam(tokens, reason))
        return beams

    def keep(self, prompts: Tensor) -> None:
        """Keep only these prompts."""
        self.texts = [self.texts[index] for index in prompts.tolist()]
        self.limits = [self.limits[index] for index in prompts.tolist()]
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[prompts])

    def last_tokens(self) -> Tensor:
        """(prompts * beams,): the newest token of every running beam."""
        return self.running[:, :, self.length - 1].flatten()

    def _ends(self, candidates: Tensor) -> Tensor:
        if self.time_is_over or self.length == min(self.limits) == max(self.limits):
            return torch.ones(candidates.shape[:2], dtype=torch.bool, device=candidates.device)
        found = candidates[:, :, : self.length].tolist()
        ends = [
            [
                self.length == limit
                or self.criteria.reason(tokens) is not None
                or self.callables.stop([*text, *tokens], candidates.device)
                for tokens in prompt
            ]
            for text, limit, prompt in zip(self.texts, self.limits, found, strict=True)
        ]
        return torch.tensor(ends, device=candidates.device)

    def _finish(self, candidates: Tensor, scores: Tensor, ends: Tensor) -> None:
        """Keep the best of the finished beams and of the candidates that end now."""
        beams = self.options.num_beams
        # Candidates past the first `num_beams` are spares for running beams: dropped if they end.
        ends = ends.clone()
        ends[:, beams:] = False
        scores = scores / (self.length**self.options.length_penalty)
        scores = scores + (~ends).float() * _NEVER

        all_scores = torch.cat([self.finished_scores, scores], dim=1)
        chosen = all_scores.topk(beams).indices
        lengths = torch.full_like(ends, self.length, dtype=torch.int64)
        self.finished_scores = all_scores.gather(1, chosen)
        self.finished = _take(torch.cat([self.finished, candidates], dim=1), chosen)
        self.finished_lengths = torch.cat([self.finished_lengths, lengths], 1).gather(1, chosen)
        self.is_finished = torch.cat([self.is_finished, ends], dim=1).gather(1, chosen)

    def _look_ahead(self) -> None:
        """Note for which prompts a running beam can still beat the worst finished one."""
        options = self.options
        lengths = [self.length] * len(self.limits)
        if options.early_stopping == "never" and options.length_penalty > 0:
            lengths = self.limits
        best = self.running_scores[:, 0]
        attainable = best / best.new_tensor([n**options.length_penalty for n in lengths])
        self.improvable = attainable > self.finished_scores.amin(dim=1)


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """(prompts, n, length) -> (prompts, m, length), by an index (prompts, m)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
