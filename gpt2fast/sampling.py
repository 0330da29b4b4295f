"""The sampling options: names, ranges and neutral values, each defined once.

Everything else follows from the fields of `SamplingOptions`: arguments of the ops that choose
tokens (`SCHEMA`, `processor_arguments`), flags of the command line, /set in a conversation, files
of prompts. A new processor of scores is a field here and a function in `ops/sampling.py`, beside
the kernels.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ._system.doors import above
from .errors import GenerationError, did_you_mean

__all__ = ["Draw", "Draws", "SamplingOptions", "draw_seed", "uniforms"]  # noqa: F822 (see __getattr__)

_COLDEST = 1e-9
_MOST_ROWS = 2**31 - 1
_LARGEST = 2**63 - 1
"""The largest whole number that an op takes; no vocabulary and no text is longer."""


@dataclass(frozen=True)
class Processor:
    """An option that changes the scores of tokens before one is chosen, as ops take it."""

    neutral: float
    """Switches the processor off. An int for an option that is a whole number."""
    high: float = math.inf
    """The largest value; the smallest is 0."""
    above: bool = False
    """True if 0 itself is out of range."""
    reads_history: bool = False
    """It depends on earlier tokens; greedy decoding and beam search apply it, too."""

    @property
    def kind(self) -> type[float]:
        """`int` or `float`."""
        return type(self.neutral)

    def argument(self, value: float | None) -> float:
        """An option's value as ops take it: None is neutral."""
        if value is None:
            return self.neutral
        return min(int(value), _LARGEST) if self.kind is int else float(value)


def _processor(default: float | None, neutral: float, **settings: Any) -> Any:
    return field(default=default, metadata={"processor": Processor(neutral, **settings)})


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
            limit = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        else:
            limit = f"above {low}" if above else f"of at least {low}"
        raise GenerationError(
            f"{name} is {value!r}; it must be a finite number {limit}{way_out}"
            + (", or None to switch it off" if off else "")
        )


@dataclass(frozen=True)
class SamplingOptions:
    """Options for choosing the next tokens. Names and meaning are transformers'; None is off.

    Raises:
        GenerationError: a value out of its range, or options that contradict each other.
    """

    max_new_tokens: int = 20
    """Most tokens to add to a prompt."""
    do_sample: bool = False
    """Draw tokens at random; otherwise take the likeliest ones."""
    temperature: float | None = _processor(1.0, 1.0, above=True)
    """Below 1 sharpens the distribution, above 1 flattens it; 0 means no sampling at all."""
    top_k: int | None = _processor(None, 0)
    """Draw from this many of the likeliest tokens; 0 is off."""
    top_p: float | None = _processor(None, 1.0, high=1)
    """Draw from the fewest likeliest tokens that have this much probability together."""
    min_p: float | None = _processor(None, 0.0, high=1)
    """Leave out tokens less likely than this times the likeliest one."""
    typical_p: float | None = _processor(None, 1.0, high=1, above=True)
    """Draw from the fewest tokens of about the expected surprise that have this much probability
    together (locally typical sampling)."""
    repetition_penalty: float | None = _processor(None, 1.0, above=True, reads_history=True)
    """Above 1 makes tokens that occurred already less likely, below 1 likelier."""
    no_repeat_ngram_size: int | None = _processor(None, 0, reads_history=True)
    """No sequence of this many tokens occurs twice; 0 is off."""
    num_beams: int = 1
    """Width of beam search; 1 is none."""
    length_penalty: float = 1.0
    """Beam search divides a log-probability by length ** length_penalty: above 0 favors long."""
    early_stopping: bool | str = False
    """Beam search ends at `num_beams` finished ones (True), when a better one is unlikely (False),
    or when a better one is impossible ("never")."""
    num_return_sequences: int = 1
    """Continuations for each prompt."""
    seed: int | None = None
    """Determines the draws; None takes one from torch's global generator for each prompt."""

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, low=0)
        _number("temperature", self.temperature, low=0, way_out="; 0 means greedy")
        if self.temperature and self.temperature < _COLDEST:
            raise GenerationError(
                f"temperature is {self.temperature!r}; logits divided by less than {_COLDEST} "
                "overflow: take 0, which means greedy"
            )
        for name, processor in PROCESSORS.items():
            if processor.kind is int:
                _whole(name, getattr(self, name), low=0, off=True)
            elif name != "temperature":
                value, above = getattr(self, name), processor.above
                _number(name, value, low=0, high=processor.high, above=above)
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
                meant = did_you_mean(name, known) or f"; there are {', '.join(known)}"
                raise GenerationError(f"there is no option {name!r} of generation{meant}")
        return replace(self, **options)

    @property
    def samples(self) -> bool:
        """True if tokens are drawn at random."""
        return self.do_sample and self.temperature != 0

    @property
    def reads_history(self) -> bool:
        """True if scores depend on earlier tokens, and not on the model's output alone."""
        return any(
            value != PROCESSORS[name].neutral for name, value in self.history_processors().items()
        )

    def history_processors(self) -> dict[str, Any]:
        """The processors that greedy and beam decoding apply too, as `ops.sample` takes them."""
        return {
            name: processor.argument(getattr(self, name))
            for name, processor in PROCESSORS.items()
            if processor.reads_history
        }

    def processors(self) -> dict[str, Any]:
        """Every processor, as `ops.sample` takes them."""
        if not self.samples:
            return self.history_processors()
        return {name: p.argument(getattr(self, name)) for name, p in PROCESSORS.items()}


PROCESSORS: dict[str, Processor] = {
    option.name: option.metadata["processor"]
    for option in fields(SamplingOptions)
    if "processor" in option.metadata
}
"""The processors of scores by name, in the order of the ops' arguments."""

_NEUTRAL = {name: processor.neutral for name, processor in PROCESSORS.items()}

SCHEMA = ", ".join(f"{processor.kind.__name__} {name}" for name, processor in PROCESSORS.items())
"""The processors as the last arguments of an op's schema: "float temperature, int top_k, …"."""

DEFAULTS = SamplingOptions(
    max_new_tokens=100, do_sample=True, temperature=0.8, top_k=50, top_p=0.95
)
"""Options of a `Generator`, unless it is told otherwise."""


def processor_arguments(options: Mapping[str, float]) -> list[float]:
    """The processors as an op takes them, in the order of `SCHEMA`: neutral where not given.

    Raises:
        TypeError: there is no processor of a name.
    """
    values = {**_NEUTRAL, **options}
    if len(values) > len(_NEUTRAL):
        name = next(iter(options.keys() - _NEUTRAL.keys()))
        raise TypeError(f"there is no processor {name!r}{did_you_mean(name, _NEUTRAL)}")
    return list(values.values())


def __getattr__(name: str) -> Any:
    # Names that need torch are imported on demand: a command line answers --help without it.
    if name in __all__:
        return getattr(above("inference.sampling"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
