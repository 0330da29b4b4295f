"""LAMBADA (Paperno et al., 2016): the last word of a passage, in OpenAI's version of the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from .likelihood import Request, Scorer
from .sources import examples_of, field, read_rows
from .task import Hub, Metric, Settings, Task, mean, perplexity


class Passage(NamedTuple):
    """A passage in two parts."""

    context: str
    word: str
    """The last word, without the space before it."""


class Lambada(Task[Passage]):
    """Prediction of the last word.

    - perplexity: exp of minus the mean over passages of the word's log-likelihood, that is the
      sum over its tokens, the space before it included.
    - acc: share of passages in which each token of the word is the likeliest one.
    - perplexity_last_token, acc_last_token: the same of the word's last token alone, the tokens
      before it being given.
    """

    name = "lambada"
    about = "LAMBADA, OpenAI's text, test: perplexity and accuracy of the last word, last token"
    files = ("lambada_test.jsonl", "lambada_test_en.jsonl")
    hub = Hub("EleutherAI/lambada_openai", "default", "test")
    published = {
        "perplexity": (35.13, 15.60, 10.87, 8.63),
        "acc_last_token": (0.4599, 0.5548, 0.6012, 0.6324),
    }
    difference = (
        "the paper's perplexity has no published recipe; its accuracies come with a filter of stop "
        "words that is not published either, and the last token alone comes nearest to them."
    )

    def read(self, path: Path) -> list[Passage]:
        """The passages of a JSONL file: {"text": ...} or {"context": ..., "continuation": ...}."""
        return self.from_rows(read_rows(path))

    def from_rows(self, rows: Iterable[Mapping[str, Any]]) -> list[Passage]:
        """Same as `Task.from_rows`."""
        return examples_of(rows, _passage)

    def evaluate(
        self, examples: Sequence[Passage], scorer: Scorer, settings: Settings
    ) -> tuple[int, dict[str, Metric]]:
        """Same as `Task.evaluate`."""
        examples = examples[: settings.limit]
        requests = []
        for context, word in examples:
            tokens, ending = scorer.encode(context, " " + word)
            requests.append(Request(tokens, [ending]))
        found = [likelihood for (likelihood,) in scorer.score(requests)]
        return len(examples), {
            "perplexity": perplexity([one.total for one in found]),
            "acc": mean([float(one.is_greedy) for one in found]),
            "perplexity_last_token": perplexity([one.logprobs[-1].item() for one in found]),
            "acc_last_token": mean([float(one.greedy[-1]) for one in found]),
        }


def _passage(row: Mapping[str, Any]) -> Passage:
    if "continuation" in row:
        text = f"{field(row, 'context', str).rstrip(' ')} {field(row, 'continuation', str).strip()}"
    else:
        text = field(row, "text", str)
    context, _, word = text.rpartition(" ")
    if not word:
        raise DataError(f"a passage ends in no word: {text[-60:]!r}")
    return Passage(context, word)
