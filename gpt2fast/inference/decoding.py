"""Greedy decoding, sampling, contrastive search: one token a step for every row that still runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import GenerationError
from ..model import GPT2
from ..sampling import SamplingOptions
from .async_decoder import AsyncDecoder
from .callables import NONE, Callables
from .contrastive import ContrastiveSearch, check_contrastive
from .engine import DecodeState, choose
from .grammar import Grammar, Matcher
from .processors import Processors
from .sampling import Draw, Draws, RowRandom
from .scores import Scores, score
from .stopping import StopCriteria
from .transfers import to_device


@dataclass
class Step:
    """One more token for each continuation that still runs; or none, and a reason to end."""

    rows: list[int]
    """Each token's continuation: prompt * num_return_sequences + sample."""
    tokens: list[int]
    reasons: list[str | None]
    """"eos", "stop", "length" or "time" where the token is its continuation's last one, else
    None."""
    scores: Scores | None
    """Log-probabilities of each token, if `alternatives` was given."""


@dataclass
class Timing:
    """Time and work of generations, by phase; seconds are wall time."""

    first_token_seconds: float | None = None
    """From the start of the first generation to its first token."""
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    """Time until the first token of every row is there."""
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    decode_bytes: int = 0
    """Weights, keys and values read by the decode steps."""

    def add_prefill(self, seconds: float, prompts: Sequence[Sequence[int]]) -> None:
        """Count a prefill: reading the prompts and choosing the first tokens."""
        if self.first_token_seconds is None:
            self.first_token_seconds = seconds
        self.prefill_tokens += sum(len(prompt) for prompt in prompts)
        self.prefill_seconds += seconds

    def add_step(self, seconds: float, rows: int, step_bytes: int) -> None:
        """Count a step that chose one more token for each row."""
        self.decode_tokens += rows
        self.decode_seconds += seconds
        self.decode_bytes += step_bytes


@torch.inference_mode()
def decode(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    options: SamplingOptions,
    criteria: StopCriteria,
    *,
    use_cache: bool = True,
    slides: bool = False,
    alternatives: int | None = None,
    vocab_size: int | None = None,
    draws: Sequence[Draw] | None = None,
    timing: Timing | None = None,
    callables: Callables = NONE,
    grammar: Grammar | None = None,
) -> Iterator[Step]:
    """Continue every prompt `options.num_return_sequences` times, greedily, by sampling or by
    contrastive search.

    A continuation depends on its own prompt and its draw alone; rows that have ended leave the
    batch.

    Args:
        limits: maximum of new tokens for each prompt, at least 1.
        alternatives: return `Scores` with this many of the likeliest tokens in each place.
        vocab_size: allow only token ids below this; None allows all.
        draws: the draw of each prompt's first continuation; by default from `Draws`.
        timing: filled in as decoding goes on.
        callables: functions of the user's to call in each step.
        grammar: what each continuation must be.
    """
    began = time.perf_counter()
    timing = Timing() if timing is None else timing
    copies, most = options.num_return_sequences, max(limits)
    rows = list(range(len(prompts) * copies))
    continuations: list[list[int]] = [[] for _ in rows]
    random: RowRandom | None = None
    if options.samples:
        if draws is None:
            hand_out = Draws()
            draws = [hand_out.take(prompt, options.seed, copies) for prompt in prompts]
        random = RowRandom([draws[row // copies].after(row % copies) for row in rows])

    with evaluating(model):
        start = time.perf_counter()
        size = model.config.vocab_size if vocab_size is None else vocab_size
        processors = Processors(options, criteria, callables, size, model.device)
        chooser: ContrastiveSearch | _Chooser
        if options.contrastive:
            check_contrastive(model, options, use_cache)
            chooser = ContrastiveSearch(model, prompts, most, options, size, processors)
            check_numbers(chooser.logits)
        else:
            state = DecodeState(model, prompts, most, use_cache=use_cache, slides=slides)
            logits = state.read()
            check_numbers(logits)
            state.expand(copies)
            logits = logits.repeat_interleave(copies, dim=0)
            scoring = alternatives is not None
            matchers = None
            if grammar is not None:
                matchers = [grammar.matcher(criteria.eos) for _ in rows]
            chooser = _Chooser(state, logits, options, random, size, scoring, processors, matchers)
        with closing(chooser):
            for step in range(most):
                chosen = chooser.next(most - step)
                seconds = time.perf_counter() - start
                if step == 0:
                    timing.add_prefill(seconds, prompts)
                else:
                    timing.add_step(seconds, len(rows), chooser.step_bytes())

                reasons: list[str | None] = []
                for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
                    continuations[row].append(token)
                    reason = criteria.reason(continuations[row])
                    if reason is None and chooser.is_complete(place):
                        reason = "stop"
                    if reason is None and callables.criteria:
                        text = [*prompts[row // copies], *continuations[row]]
                        reason = "stop" if callables.stop(text, model.device) else None
                    if reason is None and step + 1 == limits[row // copies]:
                        reason = "length"
                    reasons.append(reason)
                if options.max_time is not None and time.perf_counter() - began > options.max_time:
                    reasons = [reason or "time" for reason in reasons]
                scores = None
                if alternatives is not None:
                    scores = score(chooser.logits, chosen, alternatives)
                yield Step(rows, chosen, reasons, scores)

                start = time.perf_counter()
                live = [index for index, reason in enumerate(reasons) if reason is None]
                if not live:
                    return
                if len(live) < len(rows):
                    rows = [rows[index] for index in live]
                    chooser.keep(live)


class _Chooser:
    """The next token of every row: chosen after each step, or in blocks by an `AsyncDecoder`.

    Args:
        state: decoding state that has read the prompts.
        logits: (rows, vocab) of the first tokens.
        options: sampling options.
        random: the numbers to draw with; None takes the likeliest tokens.
        vocab_size: allow only token ids below this.
        scoring: the caller reads `logits` after each step.
        processors: those that the ops do not have; with any, every token is chosen by itself.
        matchers: of each row, where only what they allow may be chosen.
    """

    def __init__(
        self,
        state: DecodeState,
        logits: Tensor,
        options: SamplingOptions,
        random: RowRandom | None,
        vocab_size: int,
        scoring: bool,
        processors: Processors,
        matchers: list[Matcher] | None = None,
    ):
        self.logits = logits
        """(rows, vocab): the logits that the newest tokens were chosen from."""
        self._state, self._random = state, random
        self._choice = {**options.processors(), "vocab_size": vocab_size}
        self._processors, self._vocab_size = processors, vocab_size
        self._matchers = matchers
        self._reads_history = options.reads_history
        self._tokens: Tensor | None = None
        self._may_run_ahead = not (scoring or processors.stepwise or matchers is not None)
        self._ahead: AsyncDecoder | None = None

    def next(self, remaining: int) -> list[int]:
        """One more token of each row; at most `remaining` more will be asked for."""
        state, random, choice = self._state, self._random, self._choice
        if self._tokens is not None and self._may_run_ahead:
            self._may_run_ahead = False
            self._ahead = state.run_ahead(
                self._tokens, remaining, random, self._reads_history, **choice
            )
        if self._ahead is not None:
            state.count(1)
            return self._ahead.next(remaining)
        uniform = None
        if random is not None:
            uniform = to_device(random.take(1)[:, 0], self.logits.device)
        if self._matchers is not None:
            choice = {**choice, "token_mask": self._mask(self._matchers)}
        if self._processors.stepwise:
            if self._tokens is not None:
                self.logits = state.append(self._tokens)
            self._tokens = self._processors.choose(
                self.logits[:, : self._vocab_size],
                state.history,
                state.generated,
                uniform,
                choice.get("token_mask"),
            )
        elif self._tokens is None:
            self._tokens = choose(self.logits, state.history, uniform, **choice)
        else:
            self.logits, self._tokens = state.next(
                self._tokens, uniform, self._reads_history, **choice
            )
        chosen = self._tokens.tolist()
        if self._matchers is not None:
            for matcher, token in zip(self._matchers, chosen, strict=True):
                matcher.advance(token)
        return chosen

    def is_complete(self, row: int) -> bool:
        """True if nothing can follow the newest token of a row, by its grammar."""
        return self._matchers is not None and self._matchers[row].finished

    def _mask(self, matchers: Sequence[Matcher]) -> Tensor:
        """(rows, words) int32: the tokens that may come next."""
        words = torch.empty(
            len(matchers), -(-self._vocab_size // 32), dtype=torch.int32, device="cpu"
        )
        for matcher, row in zip(matchers, words, strict=True):
            matcher.mask(row)
        return words.to(self.logits.device)

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows."""
        if self._random is not None:
            self._random.keep(rows)
        if self._matchers is not None:
            self._matchers = [self._matchers[row] for row in rows]
        if self._ahead is not None:
            self._ahead.keep(rows)
            self._state.forget(rows)
        elif self._tokens is not None:
            kept = to_device(torch.tensor(rows, device="cpu"), self._tokens.device)
            self._state.keep(kept)
            self._tokens = self._tokens[kept]

    def step_bytes(self) -> int:
        """Bytes of weights and of cached keys and values that one step reads."""
        return self._state.step_bytes()

    def close(self) -> None:
        """Give a captured step back to its pool; the chooser cannot be used then."""
        if self._ahead is not None:
            self._ahead.close()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off; every module's mode is restored afterward."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_numbers(logits: Tensor) -> None:
    """Refuse logits with NaN, instead of generating nonsense."""
    if logits.isnan().any():
        raise GenerationError(
            f"the model's output is not a number in {logits.dtype}: its weights hold NaN or "
            "infinity, or overflow in this type; try dtype float32, or check the checkpoint"
        )
