"""Several tasks on one model."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..inference.packed import PackedGPT2
from ..model import GPT2
from ..tokenizer import Tokenizer
from .cbt import CommonNouns, NamedEntities
from .compression import Enwik8, Text8
from .hellaswag import HellaSwag
from .lambada import Lambada
from .likelihood import BATCH_SIZE, Scorer
from .perplexity import Perplexity, plain
from .sources import load
from .task import Metric, Settings, Task, TextTask
from .training_runs import TrainingRun, held_out_text, training_run, unigram_loss
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
    """The scores of a task."""

    task: Task[Any]
    data: str
    """The place where the examples were found."""
    examples: int
    """The number of examples that were scored."""
    metrics: dict[str, Metric]
    seconds: float
    """The time that scoring took, without reading the examples."""
    settings: dict[str, Any]
    """The settings that the task used beside `limit`, defaults included."""
    remarks: tuple[str, ...] = ()
    """Sentences about the meaning of the numbers, and doubts about them."""


def evaluate(
    model: GPT2 | PackedGPT2,
    tokenizer: Any,
    tasks: Sequence[str | Task[Any]],
    *,
    data: Mapping[str, str | os.PathLike[str]] | None = None,
    settings: Settings | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[str, int, int], None] | None = None,
    run: str | os.PathLike[str] | None = None,
) -> list[Result]:
    """Score a model on tasks. The data of all of them are read before the first is scored.

    Args:
        model, tokenizer: a pair; a tokenizer of transformers or tokenizers will do.
        tasks: names, or tasks of your own.
        data: files by the task's name; for the others see `sources.load`. For perplexity also a
            folder of prepared data or of a training run, whose held-out part is scored.
        settings: limit, context, stride, first_token.
        batch_size: sequences read at once.
        progress: called with a task's name, the number of its requests answered, and their total.
        run: folder of the training run that the model comes from, or of one of its checkpoints:
            the remarks say whether a text was trained on, and perplexity, without `data`, is that
            of the run's held-out part. Other folders and names are ignored.

    Raises:
        DataError: no such task, or its data are missing or broken.
        ArgumentError: settings that the model cannot serve.
    """
    settings, tokenizer = settings or Settings(), Tokenizer.of(tokenizer)
    chosen = [_task(task) if isinstance(task, str) else task for task in tasks]
    trained = None if run is None else training_run(run)
    given = dict(data or {})
    if trained is not None:
        given.setdefault(Perplexity.name, trained.run.folder)
    loaded = [(task, *_load(task, given.get(task.name), tokenizer)) for task in chosen]
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
        remarks = _remarks(task, examples, metrics, scorer, settings, trained)
        results.append(Result(task, place, count, metrics, seconds, used, remarks))
    return results


def _load(
    task: Task[Any], given: str | os.PathLike[str] | None, tokenizer: Tokenizer
) -> tuple[str, list[Any]]:
    if isinstance(task, Perplexity) and given is not None and Path(given).is_dir():
        place, text = held_out_text(Path(given), tokenizer)
        return f"the held-out part of {place}", [plain(text)]
    return load(task, given)


def _remarks(
    task: Task[Any],
    examples: Sequence[Any],
    metrics: Mapping[str, Metric],
    scorer: Scorer,
    settings: Settings,
    trained: TrainingRun | None,
) -> tuple[str, ...]:
    """The meaning of a text's perplexity, and a warning where the text was trained on."""
    if not isinstance(task, TextTask):
        return ()
    tokens: list[int] = []
    for document in task.chosen(examples, scorer, settings):
        tokens += scorer.tokenizer.encode(document.text, add_special_tokens=False)
    remarks = []
    if isinstance(task, Perplexity):
        remarks.append(_meaning(metrics["token_perplexity"].value, tokens, scorer, trained))
    found, looked_for = (0, 0) if trained is None else trained.seen(tokens, scorer.tokenizer)
    if trained is not None and not looked_for:
        remarks.append(
            f"whether {trained.run.folder} was trained on this text is not known: its training "
            "data are no longer there, or were made again with another tokenizer"
        )
    if trained is not None and found > looked_for // 4:
        remarks.append(
            f"warning: {found} of {looked_for} samples of this text are in what "
            f"{trained.run.folder} was trained on: this says how well the model remembers, not how "
            "well it predicts; leave out --data to score what the run held out"
        )
    return tuple(remarks)


def _meaning(
    value: float, tokens: Sequence[int], scorer: Scorer, trained: TrainingRun | None
) -> str:
    unigram, where = unigram_loss(tokens, scorer.tokenizer, trained)
    sentence = (
        f"a token_perplexity of {value:.4g} means being as unsure of the next token as among "
        f"{value:.4g} equally likely ones, a loss of {_log(value):.4f}; a model that knows only "
        f"how often each token comes {where} has {_exp(unigram):.4g}, a loss of {unigram:.4f}"
    )
    losses = "" if trained is None else trained.losses()
    return sentence + (f", and this run's last losses were {losses}" if losses else "")


def _log(value: float) -> float:
    return math.log(value) if 0 < value < math.inf else value


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _task(name: str) -> Task[Any]:
    if name not in TASKS:
        raise DataError(f"there is no task {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name]()
