"""The options of text generation, and the random numbers that a seed stands for."""

from __future__ import annotations

import difflib
import math
import numbers
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import GenerationError

_COLDEST = 1e-9
_MOST_ROWS = 2**31 - 1
_LARGEST = 2**63 - 1
"""What an op takes as a whole number; no vocabulary and no text is longer."""
_BLOCK = 256
"""Steps to draw random numbers for at a time."""


@dataclass(frozen=True)
class SamplingOptions:
    """How continuations are chosen. Names and meaning are transformers'; `None` switches off.

    Raises:
        GenerationError: a value out of its range, or options that contradict each other.
    """

    max_new_tokens: int = 20
    """Most tokens to add to a prompt."""
    do_sample: bool = False
    """Draw tokens at random; otherwise take the likeliest ones."""
    temperature: float | None = 1.0
    """Below 1 sharpens the distribution, above 1 flattens it; 0 means no sampling at all."""
    top_k: int | None = None
    """Draw from the `top_k` likeliest tokens; 0 is off."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that have this much probability together."""
    min_p: float | None = None
    """Leave out tokens less likely than this times the likeliest one."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that occurred already less likely, below 1 likelier."""
    no_repeat_ngram_size: int | None = None
    """No sequence of this many tokens occurs twice; 0 is off."""
    num_beams: int = 1
    """Width of beam search; 1 is none."""
    length_penalty: float = 1.0
    """Beam search divides a log-probability by length ** length_penalty: above 0 favours long."""
    early_stopping: bool | str = False
    """Beam search ends at `num_beams` finished ones (True), when a better one is unlikely (False),
    or when a better one is impossible ("never")."""
    num_return_sequences: int = 1
    """Continuations for each prompt."""
    seed: int | None = None
    """What the draws depend on; None takes one from torch's global generator for each prompt."""

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, low=0)
        _number("temperature", self.temperature, low=0, way_out="; 0 means greedy")
        if self.temperature and self.temperature < _COLDEST:
            raise GenerationError(
                f"temperature is {self.temperature!r}; logits divided by less than {_COLDEST} "
                "overflow: take 0, which means greedy"
            )
        _whole("top_k", self.top_k, low=0, off=True)
        _number("top_p", self.top_p, low=0, high=1)
        _number("min_p", self.min_p, low=0, high=1)
        _number("repetition_penalty", self.repetition_penalty, low=0, above=True)
        _whole("no_repeat_ngram_size", self.no_repeat_ngram_size, low=0, off=True)
        _whole("num_beams", self.num_beams, low=1, high=_MOST_ROWS)
        _number("length_penalty", self.length_penalty, low=-10, high=10, off=False)
        _whole("num_return_sequences", self.num_return_sequences, low=1, high=_MOST_ROWS)
        _whole("seed", self.seed, low=0, off=True)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise GenerationError(
                f"early_stopping is {self.early_stopping!r}; choose True, False or 'never'"
            )
        if self.num_beams > 1:
            if self.samples:
                raise GenerationError(
                    f"num_beams is {self.num_beams} and do_sample is True; beam search does not "
                    "sample here: set do_sample=False or num_beams=1"
                )
            if self.num_return_sequences > self.num_beams:
                raise GenerationError(
                    f"num_return_sequences is {self.num_return_sequences}, more than num_beams "
                    f"({self.num_beams}) can give; raise num_beams"
                )
        elif self.num_return_sequences > 1 and not self.samples:
            raise GenerationError(
                f"num_return_sequences is {self.num_return_sequences}, and greedy decoding has one "
                "continuation only; sample (do_sample=True, temperature above 0) or raise num_beams"
            )

    def changed(self, options: Mapping[str, Any]) -> SamplingOptions:
        """These options with some others in their place.

        Raises:
            GenerationError: there is no option of a name, or a value is out of its range.
        """
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise GenerationError(f"there is no option {name!r} of generation; {meant}")
        return replace(self, **options)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.do_sample and self.temperature != 0

    @property
    def reads_history(self) -> bool:
        """Whether scores depend on the tokens before, and not on the model's output alone."""
        return bool(self.no_repeat_ngram_size) or self.repetition_penalty not in (None, 1.0)

    def history_processors(self) -> dict[str, Any]:
        """The processors that greedy and beam decoding apply too, as `ops.sample` takes them."""
        return {
            "repetition_penalty": float(_or(self.repetition_penalty, 1.0)),
            "no_repeat_ngram_size": min(int(_or(self.no_repeat_ngram_size, 0)), _LARGEST),
        }

    def processors(self) -> dict[str, Any]:
        """Every processor, as `ops.sample` takes them."""
        if not self.samples:
            return self.history_processors()
        return {
            **self.history_processors(),
            "temperature": float(_or(self.temperature, 1.0)),
            "top_k": min(int(_or(self.top_k, 0)), _LARGEST),
            "top_p": float(_or(self.top_p, 1.0)),
            "min_p": float(_or(self.min_p, 0.0)),
        }


@dataclass(frozen=True)
class Draw:
    """Where the random numbers of a continuation come from."""

    seed: int
    sample: int
    """Its number among the samples that this seed gives of its prompt."""

    def after(self, samples: int) -> Draw:
        """The one of the sample so many later."""
        return Draw(self.seed, self.sample + samples)


class Draws:
    """Hands every prompt of a call the draw of its first continuation.

    With a seed, a prompt that came before goes on with the samples that follow, so that rows are
    drawn independently and a prompt's first row is what the prompt gives alone. Without one, every
    prompt gets a seed of its own from torch's global generator.
    """

    def __init__(self) -> None:
        self._taken: dict[tuple[int, tuple[int, ...]], int] = {}

    def take(self, prompt: Sequence[int], seed: int | None, samples: int) -> Draw:
        """The draw of the first of the next `samples` continuations of `prompt`.

        Args:
            prompt: token ids.
            seed: of the call; None draws one, and nothing can be repeated.
            samples: continuations that are made of this occurrence of the prompt.
        """
        if seed is None:
            return Draw(draw_seed(), 0)
        key = (seed, tuple(prompt))
        first = self._taken.get(key, 0)
        self._taken[key] = first + samples
        return Draw(seed, first)


def uniforms(draws: Sequence[Draw]) -> Iterator[Tensor]:
    """The random numbers of these continuations, on the CPU.

    The number of a draw at step t depends on its seed, its sample and t only: more samples or more
    steps change none of the others, and every prompt of a batch gets the same ones as alone.

    Returns:
        Without end, blocks (draws, steps) float32 in [0, 1), each for the next steps.
    """
    # torch's CPU generator reads 32 bits of its seed; hashing spreads all of ours over them.
    seeds = [random.Random(f"{draw.seed}/{draw.sample}").getrandbits(32) for draw in draws]
    generators = [torch.Generator("cpu").manual_seed(mixed) for mixed in seeds]
    while True:
        yield torch.stack(
            [
                torch.rand(_BLOCK, generator=generator, dtype=torch.float32, device="cpu")
                for generator in generators
            ]
        )


class RowRandom:
    """The random numbers of the continuations that still run, step after step.

    Args:
        draws: of each row.
        device: where the numbers are wanted.
    """

    def __init__(self, draws: Sequence[Draw], device: torch.device):
        # Rows of different prompts may share a draw.
        places = {draw: place for place, draw in enumerate(dict.fromkeys(draws))}
        self._blocks = uniforms(list(places))
        self._rows = torch.tensor([places[draw] for draw in draws], device="cpu")
        self._device = device
        self._left = torch.empty(len(draws), 0, dtype=torch.float32, device=device)

    def take(self, count: int) -> Tensor:
        """(rows, count) float32: the numbers of each row's next steps."""
        while self._left.shape[1] < count:
            block = next(self._blocks)[self._rows].to(self._device)
            self._left = torch.cat([self._left, block], dim=1)
        taken, self._left = self._left[:, :count], self._left[:, count:]
        return taken

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self._rows = self._rows[list(rows)]
        self._left = self._left[list(rows)]


def draw_seed() -> int:
    """A fresh seed from torch's global generator, so that `torch.manual_seed` fixes it."""
    return int(torch.randint(2**31, (), dtype=torch.int64, device="cpu"))


def _or(value: float | None, neutral: float) -> float:
    return neutral if value is None else value


def _whole(
    name: str, value: object, *, low: int, high: int | None = None, off: bool = False
) -> None:
    if value is None and off:
        return
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):  # type: ignore[operator]
        raise GenerationError(
            f"{name} is {value!r}; it must be a whole number of at least {low}"
            + ("" if high is None else f" and at most {high}")
            + (", or None to switch it off" if off else "")
        )


def _number(
    name: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    above: bool = False,
    off: bool = True,
    way_out: str = "",
) -> None:
    if value is None and off:
        return
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number = float(value) if is_number else math.nan  # type: ignore[arg-type]
    if not low <= number <= high or math.isinf(number) or (above and number == low):
        if high < math.inf:
            limit = f"from {low} to {high}"
        else:
            limit = f"above {low}" if above else f"of at least {low}"
        raise GenerationError(
            f"{name} is {value!r}; it must be a finite number {limit}{way_out}"
            + (", or None to switch it off" if off else "")
        )
