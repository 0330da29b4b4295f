"""Score a model on texts and tasks: `gpt2fast evaluate --task lambada`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._system.output import deliver, note, takes_unicode
from .arguments import CommandParser, count
from .command import command, memory_advice
from .model_flags import add_model_flags, load_generator

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..inference.generator import Generator

    Report = Callable[[str, int, int], None]

_DESCRIPTION = """\
Perplexity of any text, and the tasks of the GPT-2 paper. A task's data are looked for in the folder
$GPT2FAST_DATA, then on the Hugging Face hub; --data names a file.
"""
_EPILOG = """\
examples:
  gpt2fast evaluate --model gpt2 --task perplexity --data my.txt --stride 512
  gpt2fast evaluate --model out/run --task perplexity
      what the training run out/run held out
  gpt2fast evaluate --model gpt2 --task lambada hellaswag wikitext2 --json scores.json
  gpt2fast evaluate --model out/run --task cbt_cn --data cbtest_CN_test_2500ex.txt

tasks:
"""


def _parser() -> argparse.ArgumentParser:
    from ..evaluation import TASKS

    width = max(map(len, TASKS)) + 2
    listed = "\n".join(f"  {name:<{width}}{task.about}" for name, task in TASKS.items())
    parser = CommandParser(
        "evaluate", description=_DESCRIPTION, epilog=_EPILOG + listed, allow_abbrev=False
    )
    add_model_flags(parser)
    add = parser.add_argument
    add("-t", "--task", nargs="+", required=True, metavar="TASK", help="one or more; see below")
    add(
        "--data", action="append", default=[], metavar="[TASK=]FILE",
        help="a task's data, compressed or not; of perplexity also a folder that prepare or train "
        "made, whose held-out part is scored (the default for the model of a run); may be repeated",
    )  # fmt: skip
    add("--limit", type=count, metavar="N", help="only the first N examples of each task")
    add(
        "--context", type=count, metavar="N",
        help="of texts: tokens in a window (default: as many as the model reads)",
    )  # fmt: skip
    add(
        "--stride", type=count, metavar="N",
        help="of texts: tokens that a window predicts (default: all of them)",
    )  # fmt: skip
    add(
        "--first-token", choices=("predict", "skip"),
        help="of texts: predict the first token, from the end-of-text token, or leave it out "
        "(default: predict, where there is such a token)",
    )  # fmt: skip
    add(
        "--batch-size", type=count, default=16, metavar="N",
        help="sequences read at once (default %(default)s)",
    )  # fmt: skip
    add("--json", metavar="FILE", help="write the scores as JSON too; - is standard output, alone")
    return parser


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parse(argv)
    with memory_advice(f"take a --batch-size below {args.batch_size}"):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from ..checkpoints.hub import BUNDLED
    from ..evaluation import Settings, evaluate
    from ..evaluation.published import published_size
    from ..evaluation.results import as_object, as_table

    settings = Settings(
        limit=args.limit,
        context=args.context,
        stride=args.stride,
        first_token=None if args.first_token is None else args.first_token == "predict",
    )
    name = BUNDLED if args.model is None else args.model
    generator = load_generator(args, "scoring the bundled model {}")
    with _progress() as progress:
        results = evaluate(
            generator.model,
            generator.tokenizer,
            args.task,
            data=args.data,
            settings=settings,
            batch_size=args.batch_size,
            progress=progress,
            run=args.model,
        )
    size = published_size(name, generator.model.config)
    if args.json != "-":
        deliver(as_table(results, size))
    else:
        for result in results:
            for remark in result.remarks:
                note(f"{result.task.name}: {remark}")
    if args.json is not None:
        scores = as_object(results, size)
        _write_json(args.json, {**_about(args, generator, name), "tasks": scores})
    return 0


def _about(args: argparse.Namespace, generator: Generator, name: str) -> dict[str, Any]:
    import torch

    from .. import __version__

    model = generator.model
    return {
        "gpt2fast": __version__,
        "torch": torch.__version__,
        "model": name,
        "parameters": model.config.parameter_count,
        "weights": getattr(model, "format", str(model.dtype).removeprefix("torch.")),
        "device": str(model.device),
        "limit": args.limit,
    }


def _write_json(place: str, value: dict[str, Any]) -> None:
    from .._system.files import atomic_write_text

    # A perplexity beyond all bounds has no number in JSON.
    narrow = place == "-" and not takes_unicode()
    text = json.dumps(_finite(value), indent=2, ensure_ascii=narrow)
    if place == "-":
        deliver(text)
    else:
        atomic_write_text(place, text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


@contextlib.contextmanager
def _progress() -> Iterator[Report | None]:
    """A bar for each task on a terminal, nothing elsewhere."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        shown: dict[str, Any] = {}

        def report(task: str, done: int, total: int) -> None:
            if task not in shown:
                shown[task] = bars.add_task(task, total=total)
            bars.update(shown[task], completed=done)

        yield report


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from ..evaluation import TASKS

    parser = _parser()
    args = parser.parse_args(argv)
    unknown = [name for name in args.task if name not in TASKS]
    if unknown:
        parser.error(f"there is no task {unknown[0]!r}; choose from {', '.join(TASKS)}")
    if len(set(args.task)) < len(args.task):
        parser.error("a task is named twice")
    if args.stride is not None and args.context is not None and args.stride > args.context:
        parser.error(
            f"--stride {args.stride} is more than --context {args.context}: some tokens would "
            "never be predicted"
        )
    if args.json not in (None, "-"):
        target = Path(args.json)
        if target.is_dir():
            parser.error(f"--json {args.json}: that is a folder; name a file")
        if not os.access(target.parent, os.W_OK):
            parser.error(f"--json {args.json}: nothing can be written in {target.parent}")
    files: dict[str, str] = {}
    for given in args.data:
        task, equals, file = given.partition("=")
        if not equals or task not in TASKS:
            if len(args.task) > 1:
                parser.error(
                    f"--data {given}: of several tasks, say whose file it is: "
                    f"--data {args.task[0]}={given}"
                )
            task, file = args.task[0], given
        if task not in args.task or task in files:
            why = "given twice" if task in files else f"no --task {task}"
            parser.error(f"--data {given}: {why}")
        files[task] = file
    args.data = files
    return args
