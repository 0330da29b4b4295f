"""Tasks: examples from a file or the hub, requests to a model, scores."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from ..errors import ArgumentError, DataError
from .likelihood import Request, Scorer
from .windows import rolling_windows

ExampleT = TypeVar("ExampleT")


class Metric(NamedTuple):
    """One score."""

    value: float
    stderr: float | None = None
    """Standard error, where there is one."""


@dataclass(frozen=True)
class Settings:
    """Settings that all tasks of an evaluation share."""

    limit: int | None = None
    """Score only the first so many examples: documents of WikiText, windows of other texts."""
    context: int | None = None
    """The most tokens of a text in a window; None means the model's `n_positions`."""
    stride: int | None = None
    """Tokens of a text that each window predicts; None means `context`."""
    first_token: bool | None = None
    """Begin texts with `Tokenizer.start_token_id`, so that the first token is predicted, too.
    None: if the tokenizer has that token, and the task does not say otherwise."""

    def __post_init__(self) -> None:
        for name in ("limit", "context", "stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name} is {value}; it must be at least 1")


class Hub(NamedTuple):
    """A data set on the Hugging Face hub."""

    path: str
    config: str | None
    split: str


class Task(ABC, Generic[ExampleT]):
    """A task: where its examples are, and how a model is scored on them."""

    name: ClassVar[str]
    about: ClassVar[str]
    """One line for --help."""
    files: ClassVar[tuple[str, ...]] = ()
    """Names of the data's file in the folder $GPT2FAST_DATA, any of them."""
    hub: ClassVar[Hub | None] = None
    advice: ClassVar[str] = ""
    """Other places to get the data from, for a message."""
    published: ClassVar[Mapping[str, tuple[float, float, float, float]]] = {}
    """By metric: what Radford et al. (2019, table 3) report for 117M, 345M, 762M and 1542M."""
    difference: ClassVar[str] = ""
    """Reasons why our figures differ from those."""

    @abstractmethod
    def read(self, path: Path) -> list[ExampleT]:
        """The examples of a file. Raises DataError."""

    def from_rows(self, rows: Iterable[Mapping[str, Any]]) -> list[ExampleT]:
        """The examples of the data set on the hub, from its rows."""
        raise DataError(f"task {self.name} reads files only: give it one with --data")

    @abstractmethod
    def evaluate(
        self, examples: Sequence[ExampleT], scorer: Scorer, settings: Settings
    ) -> tuple[int, dict[str, Metric]]:
        """Score a model.

        Args:
            examples: from `read`.
            scorer: the model, with its tokenizer.
            settings: limit, context, stride, first_token.

        Returns:
            How many examples were scored, and the metrics by name.
        """

    def settings_used(self, scorer: Scorer, settings: Settings) -> dict[str, Any]:
        """The settings that this task uses beside `limit`.

        Args:
            scorer: the model, with its tokenizer.
            settings: limit, context, stride, first_token.

        Returns:
            Values by name, defaults in place of None.
        """
        return {}


@dataclass(frozen=True)
class Choice:
    """A context and the endings to choose from."""

    context: str
    endings: Sequence[str]
    """Each with its separator from the context, usually a space."""
    gold: int
    """Index of the right ending."""


class ChoiceTask(Task[Choice]):
    """Multiple choice: the model answers with the likeliest of several endings.

    - acc: share of examples whose right ending has the largest log-likelihood.
    - acc_norm: the same of log-likelihood divided by the ending's length in characters, the
      space before it not counted.
    """

    metrics: ClassVar[tuple[str, ...]] = ("acc", "acc_norm")

    def evaluate(
        self, examples: Sequence[Choice], scorer: Scorer, settings: Settings
    ) -> tuple[int, dict[str, Metric]]:
        """Same as `Task.evaluate`."""
        examples = examples[: settings.limit]
        answers = scorer.score([self._request(example, scorer) for example in examples])
        hits: dict[str, list[float]] = {"acc": [], "acc_norm": []}
        for example, likelihoods in zip(examples, answers, strict=True):
            totals = [likelihood.total for likelihood in likelihoods]
            sizes = [max(1, len(ending.removeprefix(" "))) for ending in example.endings]
            means = [total / size for total, size in zip(totals, sizes, strict=True)]
            hits["acc"].append(float(totals.index(max(totals)) == example.gold))
            hits["acc_norm"].append(float(means.index(max(means)) == example.gold))
        return len(examples), {name: mean(hits[name]) for name in self.metrics}

    def _request(self, example: Choice, scorer: Scorer) -> Request:
        pairs = [scorer.encode(example.context, ending) for ending in example.endings]
        return Request(pairs[0][0], [ending for _, ending in pairs])


@dataclass(frozen=True)
class Document:
    """A text, and the counts that its likelihood is divided by."""

    text: str
    """The text that the model reads."""
    units: Mapping[str, int]
    """Counts by unit, such as words; of the original where the text was changed for the model."""


class TextTask(Task[Document]):
    """Perplexity of running text, each document from its own beginning.

    With L the sum of log-probabilities of all tokens predicted, in nats, T their number, and U the
    number of units of the texts:

    - token_perplexity: exp(-L / T)
    - a perplexity per unit: exp(-L / U)
    - bits per unit: -L / (U ln 2)

    `metrics` says which of them, as a mapping from a metric's name to its unit.
    """

    metrics: ClassVar[Mapping[str, str]]
    first_token: ClassVar[bool] = True
    """Begin with the tokenizer's `start_token_id` unless the settings say otherwise."""

    def shorten(self, documents: Sequence[Document], count: int, cut: Cut) -> Sequence[Document]:
        """The documents that --limit leaves: the first `count`; `cut` shortens a text."""
        return documents[:count]

    def evaluate(
        self, examples: Sequence[Document], scorer: Scorer, settings: Settings
    ) -> tuple[int, dict[str, Metric]]:
        """Same as `Task.evaluate`."""
        context, stride, first = self._windows(scorer, settings)
        encode = functools.partial(scorer.tokenizer.encode, add_special_tokens=False)
        examples = self.chosen(examples, scorer, settings)
        windows = [
            window
            for document in examples
            for window in rolling_windows(encode(document.text), context, stride, first)
        ]
        if not windows:
            raise DataError("the text is too short: there is no token to predict")
        found = [likelihood for (likelihood,) in scorer.score(windows)]
        total = math.fsum(likelihood.total for likelihood in found)
        counts = {"token": sum(len(likelihood.logprobs) for likelihood in found)}
        for document in examples:
            for unit, count in document.units.items():
                counts[unit] = counts.get(unit, 0) + count
        return len(examples), {
            name: Metric(_per_unit(total, counts[unit], bits=name.startswith("bits")))
            for name, unit in self.metrics.items()
        }

    def chosen(
        self, examples: Sequence[Document], scorer: Scorer, settings: Settings
    ) -> Sequence[Document]:
        """The documents that the limit of the settings leaves.

        Args:
            examples: all of them.
            scorer: the model, with its tokenizer.
            settings: limit, context, stride.
        """
        if settings.limit is None:
            return examples
        context, stride, _ = self._windows(scorer, settings)
        most = context + (settings.limit - 1) * stride
        encode = functools.partial(scorer.tokenizer.encode, add_special_tokens=False)
        decode = scorer.tokenizer.decode
        return self.shorten(examples, settings.limit, lambda text: decode(encode(text)[:most]))

    def settings_used(self, scorer: Scorer, settings: Settings) -> dict[str, Any]:
        """Same as `Task.settings_used`."""
        context, stride, first = self._windows(scorer, settings)
        return {"context": context, "stride": stride, "first_token": first is not None}

    def _windows(self, scorer: Scorer, settings: Settings) -> tuple[int, int, int | None]:
        most = scorer.model.config.n_positions
        context = most if settings.context is None else settings.context
        if context > most:
            raise ArgumentError(
                f"context is {context}, and this model reads at most {most} tokens (n_positions)"
            )
        stride = context if settings.stride is None else settings.stride
        if stride > context:
            raise ArgumentError(
                f"stride is {stride}, more than the {context} tokens of a window: some tokens "
                "would never be predicted"
            )
        first = scorer.tokenizer.start_token_id
        wanted = settings.first_token
        if wanted and first is None:
            raise ArgumentError(
                "this tokenizer has no end-of-text token to begin with: skip the first token"
            )
        if wanted is None:
            wanted = self.first_token and first is not None
        if not wanted and context < 2:
            raise ArgumentError("context is 1, which leaves no token to predict: take 2 or more")
        return context, stride, first if wanted else None


Cut = Callable[[str], str]
"""A text cut to the tokens that --limit allows."""


def mean(values: Sequence[float]) -> Metric:
    """The mean, with its standard error: sample standard deviation / sqrt(n)."""
    count = len(values)
    average = math.fsum(values) / count
    if count < 2:
        return Metric(average)
    variance = math.fsum((value - average) ** 2 for value in values) / (count - 1)
    return Metric(average, math.sqrt(variance / count))


def perplexity(likelihoods: Sequence[float]) -> Metric:
    """exp(-mean) of log-likelihoods; its standard error is the mean's times it (delta method)."""
    average = mean(likelihoods)
    value = _exp(-average.value)
    return Metric(value, None if average.stderr is None else value * average.stderr)


def _per_unit(total: float, count: int, bits: bool) -> float:
    loss = -total / count if count else math.nan
    return loss / math.log(2) if bits else _exp(loss)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
