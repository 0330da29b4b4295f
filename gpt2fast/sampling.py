"""The sampling options: names, ranges and neutral values, each defined once.

Everything else follows from the fields of `SamplingOptions`: arguments of the ops that choose
tokens (`SCHEMA`, `processor_arguments`), flags of the command line, /set in a conversation, files
of prompts. A new processor of scores is a field here and a function in `ops/sampling.py`, beside
the kernels; one that kernels need not have (`fused=False`) is a function in
`inference/processors.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ._system.doors import above
from ._system.option_checks import check_number, check_whole, token_biases, token_sequences
from .errors import GenerationError, did_you_mean

__all__ = ["Draw", "Draws", "SamplingOptions", "draw_seed", "uniforms"]  # noqa: F822 (see __getattr__)

_COLDEST = 1e-9
_MOST_ROWS = 2**31 - 1
_NO_TIME = 5e-324
"""The least of all times."""
_LARGEST = 2**63 - 1
"""The largest whole number that an op takes; no vocabulary and no text is longer."""


@dataclass(frozen=True)
class Processor:
    """An option that changes the scores of tokens before one is chosen, as ops take it."""

    neutral: float
    """Switches the processor off. An int for an option that is a whole number."""
    low: float = 0
    """The smallest value."""
    high: float = math.inf
    """The largest value."""
    above: bool = False
    """True if the smallest value itself is out of range."""
    below: bool = False
    """True if the largest value itself is out of range."""
    reads_history: bool = False
    """It depends on earlier tokens; greedy decoding and beam search apply it, too."""
    fused: bool = True
    """An argument of the ops; otherwise each step applies it by itself."""

    @property
    def kind(self) -> type[float]:
        """`int` or `float`."""
        return type(self.neutral)

    def argument(self, value: float | None) -> float:
        """An option's value as ops take it: None is neutral."""
        if value is None:
            return self.neutral
        return min(int(value), _LARGEST) if self.kind is int else float(value)


def _processor(
    default: float | None, neutral: float, *, of_checkpoint: bool = False, **settings: Any
) -> Any:
    metadata = {"processor": Processor(neutral, **settings), "of_checkpoint": of_checkpoint}
    return field(default=default, metadata=metadata)


def _of_checkpoint(default: Any) -> Any:
    """A field that a checkpoint's generation_config.json sets unless a call does."""
    return field(default=default, metadata={"of_checkpoint": True})


@dataclass(frozen=True)
class SamplingOptions:
    """Options for choosing the next tokens. Names and meaning are transformers'; None is off.

    Raises:
        GenerationError: a value out of its range, or options that contradict each other.
    """

    max_new_tokens: int | None = _of_checkpoint(20)
    """Most tokens to add to a prompt; None where `max_length` says it."""
    max_length: int | None = _of_checkpoint(None)
    """Most tokens of prompt and continuation together, in place of max_new_tokens."""
    min_new_tokens: int | None = _of_checkpoint(None)
    """No end token, and no stop sequence of tokens, before this many are added; a stop text ends it
    all the same."""
    max_time: float | None = _of_checkpoint(None)
    """Seconds after which a text ends where it is, counted from the start of its batch."""
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
    epsilon_cutoff: float | None = _processor(
        None, 0.0, high=1, below=True, fused=False, of_checkpoint=True
    )
    """Leave out tokens of a lower probability than this; 0 is off."""
    eta_cutoff: float | None = _processor(
        None, 0.0, high=1, below=True, fused=False, of_checkpoint=True
    )
    """Leave out tokens less likely than this and than sqrt(this) * exp(-entropy); 0 is off."""
    frequency_penalty: float | None = _processor(
        None, 0.0, low=-2, high=2, reads_history=True, fused=False
    )
    """Subtract this from a token's score for each time that it was generated."""
    presence_penalty: float | None = _processor(
        None, 0.0, low=-2, high=2, reads_history=True, fused=False
    )
    """Subtract this from the score of every token that was generated."""
    penalty_alpha: float | None = _processor(None, 0.0, high=1, reads_history=True, fused=False)
    """Contrastive search in place of sampling: of the `top_k` likeliest tokens, the one with the
    most of (1 - this) times its probability, minus this times its likeness to a token before; 0 is
    off."""
    logit_bias: Mapping[int, float] | None = None
    """Numbers from -100 to 100 to add to the scores of tokens, by their ids."""
    bad_words_ids: Sequence[Sequence[int]] | None = _of_checkpoint(None)
    """Sequences of tokens that never occur; an end token alone is passed over."""
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
        self._check_lengths()
        check_number("max_time", self.max_time, low=0, above=True)
        check_number("temperature", self.temperature, low=0, way_out="; 0 means greedy")
        if self.temperature and self.temperature < _COLDEST:
            raise GenerationError(
                f"temperature is {self.temperature!r}; logits divided by less than {_COLDEST} "
                "overflow: take 0, which means greedy"
            )
        for name, option in {**PROCESSORS, **STEPWISE}.items():
            value = getattr(self, name)
            if option.kind is int:
                check_whole(name, value, low=0, off=True)
            elif name != "temperature":
                check_number(
                    name, value,
                    low=option.low, high=option.high, above=option.above, below=option.below,
                )  # fmt: skip
        object.__setattr__(self, "logit_bias", token_biases(self.logit_bias))
        object.__setattr__(
            self, "bad_words_ids", token_sequences("bad_words_ids", self.bad_words_ids)
        )
        check_whole("num_beams", self.num_beams, low=1, high=_MOST_ROWS)
        check_number("length_penalty", self.length_penalty, low=-10, high=10, off=False)
        check_whole("num_return_sequences", self.num_return_sequences, low=1, high=_MOST_ROWS)
        check_whole("seed", self.seed, low=0, off=True)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise GenerationError(
                f"early_stopping is {self.early_stopping!r}; choose True, False or 'never'"
            )
        if self.contrastive:
            self._check_contrastive()
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

    def _check_lengths(self) -> None:
        if self.max_new_tokens is not None:
            check_whole("max_new_tokens", self.max_new_tokens, low=0)
        check_whole("max_length", self.max_length, low=0, off=True)
        check_whole("min_new_tokens", self.min_new_tokens, low=0, off=True)
        if self.max_new_tokens is not None and self.max_length is not None:
            raise GenerationError(
                f"max_new_tokens is {self.max_new_tokens} and max_length, which counts the prompt "
                f"too, is {self.max_length}: leave one of them out"
            )
        if self.max_new_tokens is None and self.max_length is None:
            raise GenerationError(
                "max_new_tokens is None, and so is max_length; one of them must be a whole number "
                "of at least 0"
            )
        least, most = self.min_new_tokens, self.max_new_tokens
        if least is not None and most is not None and least > most:
            raise GenerationError(
                f"min_new_tokens is {least}, more than max_new_tokens ({most}): raise "
                "max_new_tokens, or lower min_new_tokens"
            )

    def _check_contrastive(self) -> None:
        asked = f"penalty_alpha is {self.penalty_alpha}, which asks for contrastive search"
        if self.num_beams > 1 or self.num_return_sequences > 1:
            raise GenerationError(
                f"{asked}, and num_beams is {self.num_beams}, num_return_sequences "
                f"{self.num_return_sequences}: it has no beams and one continuation; set both to 1"
            )
        if self.top_k is None or self.top_k < 2:
            raise GenerationError(
                f"{asked}, and top_k is {self.top_k!r}: set it to the number of candidates that "
                "each step compares, at least 2 (4 to 8 are usual)"
            )

    def changed(self, options: Mapping[str, Any]) -> SamplingOptions:
        """These options with some others in their place, as `overridden` does it.

        Raises:
            GenerationError: there is no option of a name, or a value is out of its range.
        """
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                meant = did_you_mean(name, known) or f"; there are {', '.join(known)}"
                raise GenerationError(f"there is no option {name!r} of generation{meant}")
        return replace(self, **overridden({}, options))

    def of_call(self, settings: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingOptions:
        """The options of a call, where these are the defaults.

        Args:
            settings: content of the checkpoint's generation_config.json, whose `OF_CHECKPOINT`
                go before the defaults. As in transformers, max_new_tokens goes before max_length
                there.
            given: arguments of the call, which go before both.

        Raises:
            GenerationError: as in `changed`.
        """
        file = {
            name: value
            for name in OF_CHECKPOINT
            if name not in given
            and (value := as_transformers_reads(name, settings.get(name))) is not None
        }
        if "max_new_tokens" in file:
            file.pop("max_length", None)
        options = overridden(file, given)
        least, most = file.get("min_new_tokens"), options.get("max_new_tokens", self.max_new_tokens)
        if type(least) is int and type(most) is int:
            options["min_new_tokens"] = min(least, most)
        return self.changed(options)

    def new_tokens(self, prompt_tokens: int, name: str) -> int:
        """Most tokens to add to a prompt.

        Args:
            prompt_tokens: its length.
            name: its name in errors.

        Raises:
            GenerationError: it has all of `max_length` already.
        """
        if self.max_length is None:
            assert self.max_new_tokens is not None
            return self.max_new_tokens
        if prompt_tokens >= self.max_length:
            raise GenerationError(
                f"{name} has {prompt_tokens} tokens, and max_length (of the call, or of the "
                f"model's generation_config.json), which counts them too, is {self.max_length}: "
                "raise it, or pass max_new_tokens instead"
            )
        return self.max_length - prompt_tokens

    @property
    def samples(self) -> bool:
        """True if tokens are drawn at random."""
        return self.do_sample and self.temperature != 0 and not self.contrastive

    @property
    def contrastive(self) -> bool:
        """True if tokens are chosen by contrastive search."""
        return bool(self.penalty_alpha)

    @property
    def reads_history(self) -> bool:
        """True if the ops' processors depend on earlier tokens."""
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
    if "processor" in option.metadata and option.metadata["processor"].fused
}
"""The processors of scores by name, in the order of the ops' arguments."""

STEPWISE: dict[str, Processor] = {
    option.name: option.metadata["processor"]
    for option in fields(SamplingOptions)
    if "processor" in option.metadata and not option.metadata["processor"].fused
}
"""Processors of scores that the ops do not have."""

OF_CHECKPOINT = tuple(
    option.name for option in fields(SamplingOptions) if option.metadata.get("of_checkpoint")
)
"""Options that a checkpoint's generation_config.json sets, where a call does not."""

_NEUTRAL = {name: processor.neutral for name, processor in PROCESSORS.items()}

SCHEMA = ", ".join(f"{processor.kind.__name__} {name}" for name, processor in PROCESSORS.items())
"""The processors as the last arguments of an op's schema: "float temperature, int top_k, …"."""

DEFAULTS = SamplingOptions(
    max_new_tokens=100, do_sample=True, temperature=0.8, top_k=50, top_p=0.95
)
"""Options of a `Generator`, unless it is told otherwise."""


def as_transformers_reads(name: str, value: Any) -> Any:
    """A setting of generation_config.json as an option's value; None where it says nothing.

    transformers checks few of them, and compares the others: a length of 9.5 is reached at 10, no
    time at all ends a text after its first token, and cutoffs out of their range are off.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if name in ("max_new_tokens", "max_length") and math.isfinite(value):
        return math.ceil(value)
    if name == "max_time" and value <= 0:
        return _NO_TIME
    off = name in ("epsilon_cutoff", "eta_cutoff") and not 0 < value < 1
    return None if off or (name == "min_new_tokens" and value <= 0) else value


def overridden(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Options with `own` in their place; of max_length and max_new_tokens, one ousts the other."""
    ousted: dict[str, Any] = {}
    if own.get("max_length") is not None:
        ousted["max_new_tokens"] = None
    elif own.get("max_new_tokens") is not None:
        ousted["max_length"] = None
    return {**options, **ousted, **own}


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
