"""Several tasks on one model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from ..model import GPT2
from ..packed import PackedGPT2
from ..tokenizer import Tokenizer
from .cbt import CommonNouns, NamedEntities
from .compression import Enwik8, Text8
from .hellaswag import HellaSwag
from .lambada import Lambada
from .likelihood import BATCH_SIZE, Scorer
from .perplexity import Perplexity
from .sources import load
from .task import Metric, Settings, Task
from .wikitext import WikiText2, WikiText2Joined, WikiText103

TASKS: dict[str, type[Task[Any]]] = {
    task.name: task
    for task in (
        Perplexity, WikiText2, WikiText2Joined, WikiText103, Lambada, HellaSwag, CommonNouns,
        NamedEntities, Enwik8, Text8,
    )
}  # fmt: skip
"""The tasks that come with gpt2fast, by name."""


@dataclass(frozen=True)
class Result:
    """What a task came to."""

    task: Task[Any]
    data: str
    """Where the examples were found."""
    examples: int
    """How many were scored."""
    metrics: dict[str, Metric]
    seconds: float
    """For scoring; reading the examples does not count."""
    settings: dict[str, Any]
    """That the task heeds beside `limit`; what was not given has its default."""


def evaluate(
    model: GPT2 | PackedGPT2,
    tokenizer: Tokenizer,
    tasks: Sequence[str | Task[Any]],
    *,
    data: Mapping[str, str | os.PathLike[str]] | None = None,
    settings: Settings | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Result]:
    """Score a model on tasks. The data of all of them are read before the first is scored.

    Args:
        model, tokenizer: which belong together; the tokenizer's ids lie in the model's vocabulary.
        tasks: names, or tasks of your own.
        data: files by the task's name; where else is looked, `sources.load` says.
        settings: limit, context, stride, first_token.
        batch_size: sequences read at once.
        progress: called with a task's name, and how many of its requests of how many are answered.

    Raises:
        DataError: no such task, or its data are missing or broken.
        ArgumentError: settings that the model cannot serve.
    """
    settings = settings or Settings()
    chosen = [_task(task) if isinstance(task, str) else task for task in tasks]
    loaded = [(task, *load(task, (data or {}).get(task.name))) for task in chosen]
    results = []
    for task, place, examples in loaded:

        def report(done: int, total: int, name: str = task.name) -> None:
            if progress is not None:
                progress(name, done, total)

        scorer = Scorer(model, tokenizer, batch_size=batch_size, progress=report)
        start = time.perf_counter()
        count, metrics = task.evaluate(examples, scorer, settings)
        seconds = time.perf_counter() - start
        used = task.settings_used(scorer, settings)
        results.append(Result(task, place, count, metrics, seconds, used))
    return results


def _task(name: str) -> Task[Any]:
    if name not in TASKS:
        raise DataError(f"there is no task {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name]()
