"""Greedy decoding and sampling: one token a step for every row that still runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..errors import GenerationError
from ..sampling_options import SamplingOptions
from ..tokenizer.foreign import Decoding
from .cuda_graphs import Ahead, is_worthwhile
from .sampling import Draw, Draws, Numbers
from .scores import Scores, score

if TYPE_CHECKING:
    from ..model import GPT2


class Context:
    """What the model has read: the tokens of every row, and their keys and values in the cache.

    Args:
        prompts: token ids of each row, at least one; rows may differ in length.
        steps: most tokens that will be appended to a row.
        use_cache: keep keys and values; without, every step reads everything again.
        slides: a row that reaches `n_positions` goes on with the newest half of its tokens;
            without, the caller sees to it that no row gets that far.
    """

    def __init__(
        self,
        model: GPT2,
        prompts: Sequence[Sequence[int]],
        steps: int,
        *,
        use_cache: bool = True,
        slides: bool = False,
    ):
        self.model = model.for_decoding()
        longest = max(len(prompt) for prompt in prompts)
        self._columns = torch.tensor(
            [[-1] * (longest - len(prompt)) + list(prompt) for prompt in prompts],
            device=model.device,
        )
        self._filled = longest
        self._room = model.config.n_positions
        self._half = max(1, self._room // 2)
        self._visible = [len(prompt) for prompt in prompts]
        """Tokens of each row that the model sees, the newest ones of its history."""
        if slides:
            self._visible = [n if n <= self._room else self._half for n in self._visible]
        self._cache = None
        self._entry_bytes = 0
        if use_cache:
            capacity = min(max(self._visible) + steps, self._room)
            self._cache = self.model.new_cache(len(prompts), capacity)
            self._entry_bytes = self._cache.entry_bytes

    @property
    def history(self) -> Tensor:
        """(rows, S) int64: each row's tokens up to the last column, after -1 as padding."""
        return self._columns[:, : self._filled]

    def read(self) -> Tensor:
        """Read all that is visible; returns the logits (rows, vocab) of every row's next token."""
        return self._read(self._visible, [0] * len(self._visible))

    def append(self, tokens: Tensor) -> Tensor:
        """Add a token (rows,) to each row; returns the logits (rows, vocab) of the next ones."""
        self._remember(tokens)
        full = [row for row, count in enumerate(self._visible) if count == self._room]
        before = self._visible
        self._visible = [self._half if n == self._room else n + 1 for n in before]
        if self._cache is None:
            return self.read()
        if not full:
            return self.model.decode_step(tokens, self._cache)
        self._cache.release(torch.tensor(full, device=tokens.device))
        news = [self._half if n == self._room else 1 for n in before]
        return self._read(news, [0 if n == self._room else n for n in before])

    def next(
        self, tokens: Tensor, uniform: Tensor | None, reads_history: bool, **choice: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a token (rows,) to each row and choose the next ones.

        Args:
            uniform, choice: as `ops.packed_next` takes them.
            reads_history: whether the choice does.

        Returns:
            Logits (rows, vocab) and tokens (rows,).
        """
        if self._cache is None or self._room in self._visible:
            logits = self.append(tokens)
            history = self.history if reads_history else self._columns[:, :0]
            return logits, choose(logits, history, uniform, **choice)
        self._remember(tokens)
        self._visible = [count + 1 for count in self._visible]
        history = self.history if reads_history else self._columns[:, :0]
        return self.model.next_tokens(tokens, self._cache, history, uniform, **choice)

    def run_ahead(
        self, tokens: Tensor, steps: int, numbers: Numbers | None, **choice: Any
    ) -> Ahead | None:
        """What chooses the tokens of the next steps in blocks, where that is worth while.

        Args:
            tokens: (rows,) the newest ones, not read yet.
            steps: to come, at most.
            numbers, choice: as `Ahead` takes them; the choice must not read the history.

        Returns:
            None if steps are to be taken one by one: not on a GPU, or for a row that would have to
            slide on the way. Otherwise it has a cache of its own and the one here is gone; `count`
            and `forget` say here what happens there.
        """
        longest = max(self._visible)
        fits = longest + steps <= self._room
        if self._cache is None or not fits or not is_worthwhile(self.model, steps):
            return None
        ahead = Ahead(self.model, self._cache, longest, tokens, numbers, **choice)
        self._cache = None
        return ahead

    def count(self, tokens: int) -> None:
        """So many tokens of each row were read elsewhere."""
        self._visible = [visible + tokens for visible in self._visible]

    def forget(self, rows: Sequence[int]) -> None:
        """Only these rows are still read elsewhere."""
        self._visible = [self._visible[row] for row in rows]

    def expand(self, copies: int) -> None:
        """Repeat every row, the copies side by side."""
        if copies == 1:
            return
        self._columns = self._columns.repeat_interleave(copies, dim=0)
        self._visible = [count for count in self._visible for _ in range(copies)]
        if self._cache is not None:
            self._cache.expand(copies)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (an index tensor); a row may be left out or taken twice."""
        self._columns = self._columns[rows]
        self._visible = [self._visible[row] for row in rows.tolist()]
        if self._cache is not None:
            self._cache.reorder(rows)

    def step_bytes(self) -> int:
        """Bytes of weights and of cached keys and values that one step reads."""
        return self.model.weight_bytes + sum(self._visible) * self._entry_bytes

    def _remember(self, tokens: Tensor) -> None:
        if self._filled == self._columns.shape[1]:
            room = self._columns.new_full((len(tokens), 256), -1)
            self._columns = torch.cat([self._columns, room], dim=1)
        self._columns[:, self._filled] = tokens
        self._filled += 1

    def _read(self, counts: list[int], offsets: list[int]) -> Tensor:
        """Read each row's newest `counts[row]` tokens, from position `offsets[row]` on."""
        return self.model.read(self.history, counts, offsets, self._cache)


class StopCriteria:
    """When a continuation has ended by what was generated, not counting its length.

    Args:
        eos: ids that end a text.
        stop: strings, or sequences of token ids, that end a continuation.
        tokenizer: decodes tokens to look for the strings in; transformers' objects are taken as
            they are.

    Raises:
        GenerationError: a stop that is none, or strings without a tokenizer.
        TokenizerError: what should be a tokenizer is none.
    """

    def __init__(
        self,
        eos: Sequence[int],
        stop: str | Sequence[str | Sequence[int]] | None = None,
        tokenizer: Any = None,
    ):
        self.eos = list(eos)
        self.strings: list[str] = []
        self._sequences: list[list[int]] = []
        if stop is not None and not isinstance(stop, Iterable):
            raise GenerationError(f"stop is {stop!r}; it must be a text, or a list of texts")
        for item in [stop] if isinstance(stop, str) else stop or []:
            if isinstance(item, str) and item:
                self.strings.append(item)
            elif isinstance(item, Sequence) and item and all(isinstance(i, int) for i in item):
                self._sequences.append(list(item))  # type: ignore[arg-type]
            else:
                raise GenerationError(
                    f"stop has the item {item!r}; each must be a text of at least one character, "
                    "or a list of at least one token id"
                )
        if self.strings and tokenizer is None:
            raise GenerationError(
                f"stop has the text {self.strings[0]!r}, which takes a tokenizer to find: pass "
                "tokenizer=..., or lists of token ids"
            )
        self._tokenizer = None if tokenizer is None else Decoding(tokenizer)
        # Every token has at least one byte, so this many reach back over a whole stop string, and
        # over the character that the cut may have split in front of it.
        self._reach = max((len(text.encode()) for text in self.strings), default=0) + 4

    def reason(self, tokens: Sequence[int]) -> str | None:
        """Why a continuation ends with the last of `tokens`: "eos", "stop", or None if it doesn't.

        Ask after each token: only what ends with the last one is found.
        """
        if tokens[-1] in self.eos:
            return "eos"
        for sequence in self._sequences:
            if list(tokens[-len(sequence) :]) == sequence:
                return "stop"
        if self.strings and self._tokenizer is not None:
            # A model may have more ids than the tokenizer has tokens; those have no text.
            ends = (token for token in reversed(tokens) if token in self._tokenizer)
            text = self._tokenizer.decode([*islice(ends, self._reach)][::-1])
            if any(string in text for string in self.strings):
                return "stop"
        return None


@dataclass
class Step:
    """One more token for each continuation that still runs."""

    rows: list[int]
    """Which continuation each token belongs to: prompt * num_return_sequences + sample."""
    tokens: list[int]
    reasons: list[str | None]
    """Where the token is the continuation's last one, why: "eos", "stop" or "length"."""
    scores: Scores | None
    """Of each token, if they are asked for."""


@dataclass
class Timing:
    """Where the time of generations went; seconds are wall time."""

    first_token_seconds: float | None = None
    """From the start of the first generation to its first token."""
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    """Until the first token of every row is there."""
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    decode_bytes: int = 0
    """Weights, keys and values read by the decode steps."""

    def add_prefill(self, seconds: float, prompts: Sequence[Sequence[int]]) -> None:
        """Count the reading of the prompts and the choice of the first tokens."""
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
) -> Iterator[Step]:
    """Continue every prompt `options.num_return_sequences` times, greedily or by sampling.

    What a continuation holds depends on its own prompt and its draw alone; rows that have ended
    leave the batch.

    Args:
        limits: most new tokens for each prompt, at least one.
        alternatives: give the tokens' `Scores`, with so many of the likeliest tokens each.
        vocab_size: take only tokens below this id; None allows all.
        draws: of the first continuation of each prompt; those of `Draws` if not given.
        timing: filled in as decoding goes on.
    """
    timing = Timing() if timing is None else timing
    copies = options.num_return_sequences
    rows = list(range(len(prompts) * copies))
    continuations: list[list[int]] = [[] for _ in rows]
    numbers: Numbers | None = None
    if options.samples:
        if draws is None:
            hand_out = Draws()
            draws = [hand_out.take(prompt, options.seed, copies) for prompt in prompts]
        numbers = Numbers([draws[row // copies].after(row % copies) for row in rows], model.device)
    choice = {**options.processors(), "vocab_size": vocab_size}
    ahead: Ahead | None = None

    with evaluating(model), ExitStack() as leaving:
        start = time.perf_counter()
        context = Context(model, prompts, max(limits), use_cache=use_cache, slides=slides)
        logits = context.read()
        check_numbers(logits)
        context.expand(copies)
        logits = logits.repeat_interleave(copies, dim=0)
        for step in range(max(limits)):
            if ahead is not None:
                chosen = ahead.next(max(limits) - step)
                context.count(1)
            else:
                uniform = None if numbers is None else numbers.take(1)[:, 0]
                if step == 0:
                    tokens = choose(logits, context.history, uniform, **choice)
                else:
                    logits, tokens = context.next(tokens, uniform, options.reads_history, **choice)
                chosen = tokens.tolist()
            seconds = time.perf_counter() - start
            if step == 0:
                timing.add_prefill(seconds, prompts)
            else:
                timing.add_step(seconds, len(rows), context.step_bytes())

            reasons: list[str | None] = []
            for row, token in zip(rows, chosen, strict=True):
                continuations[row].append(token)
                reason = criteria.reason(continuations[row])
                if reason is None and step + 1 == limits[row // copies]:
                    reason = "length"
                reasons.append(reason)
            scores = None if alternatives is None else score(logits, chosen, alternatives)
            yield Step(rows, chosen, reasons, scores)

            start = time.perf_counter()
            live = [index for index, reason in enumerate(reasons) if reason is None]
            if not live:
                return
            if len(live) < len(rows):
                rows = [rows[index] for index in live]
                if numbers is not None:
                    numbers.keep(live)
                if ahead is not None:
                    ahead.keep(live)
                    context.forget(live)
                else:
                    kept = torch.tensor(live, device=model.device)
                    context.keep(kept)
                    tokens = tokens[kept]
            if step == 0 and alternatives is None and not options.reads_history:
                ahead = context.run_ahead(tokens, max(limits) - 1, numbers, **choice)
                if ahead is not None:
                    leaving.callback(ahead.close)


def choose(
    logits: Tensor,
    history: Tensor,
    uniform: Tensor | None,
    vocab_size: int | None = None,
    **processors: Any,
) -> Tensor:
    """`ops.sample` among the tokens below `vocab_size`; None allows all."""
    return ops.sample(logits[:, :vocab_size], history, uniform, **processors)


@contextmanager
def evaluating(model: GPT2) -> Iterator[None]:
    """Switch dropout off; every module's mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_numbers(logits: Tensor) -> None:
    """Refuse a model whose output is not a number, instead of writing nonsense."""
    if logits.isnan().any():
        raise GenerationError(
            f"the model's output is not a number in {logits.dtype}: its weights hold NaN or "
            "infinity, or overflow in this type; try dtype float32, or check the checkpoint"
        )
