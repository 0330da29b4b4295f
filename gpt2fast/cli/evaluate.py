"""Score a model on texts and tasks: `python -m gpt2fast.evaluate --task lambada`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._system.output import complain, deliver, note, takes_unicode
from .arguments import OneLineParser, ParagraphFormatter, usable_device
from .command import command

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
  python -m gpt2fast.evaluate --model gpt2 --task perplexity --data my.txt --stride 512
  python -m gpt2fast.evaluate --model out/run --task perplexity
      what the training run out/run held out
  python -m gpt2fast.evaluate --model gpt2 --task lambada hellaswag wikitext2 --json scores.json
  python -m gpt2fast.evaluate --model out/run --task cbt_cn --data cbtest_CN_test_2500ex.txt

tasks:
"""
_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    from ..errors import Error

    try:
        args = _parse(argv)
        return _run(args)
    except Error as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return _fail(f"reading or writing failed: {error}")
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError) or any(
            words in str(error).lower() for words in _NO_MEMORY
        )
        if not known:
            raise
        return _fail(f"out of memory: take a --batch-size below {args.batch_size}")


def _run(args: argparse.Namespace) -> int:
    from ..evaluation import Settings, evaluate
    from ..evaluation.published import published_size
    from ..evaluation.results import as_object, as_table

    settings = Settings(
        limit=args.limit,
        context=args.context,
        stride=args.stride,
        first_token=None if args.first_token is None else args.first_token == "predict",
    )
    generator, name = _load(args)
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


def _load(args: argparse.Namespace) -> tuple[Generator, str]:
    from ..checkpoints.hub import BUNDLED
    from ..inference.generator import Generator
    from ..ops.backend import backend

    backend(args.backend)
    name = BUNDLED if args.model is None else args.model
    if args.model is None:
        complain(f"scoring the bundled model {BUNDLED!r}; --model gpt2 gets OpenAI's GPT-2")
    generator = Generator.from_pretrained(
        name,
        tokenizer=args.tokenizer,
        preset=args.preset,
        device=usable_device(args.device),
        dtype=args.dtype,
        adapter=args.adapter,
        quantize=args.quantize,
        notify=note,
    )
    return generator, name


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


def _fail(error: object, code: int = 1) -> int:
    complain("error: " + " ".join(str(error).split()))
    return code


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


def _parser() -> argparse.ArgumentParser:
    from ..evaluation import TASKS

    width = max(map(len, TASKS)) + 2
    listed = "\n".join(f"  {name:<{width}}{task.about}" for name, task in TASKS.items())
    parser = OneLineParser(
        prog="python -m gpt2fast.evaluate",
        description=_DESCRIPTION,
        epilog=_EPILOG + listed,
        formatter_class=ParagraphFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-m", "--model", metavar="NAME", help="bundled model, path, or name on the hub")
    add("-t", "--task", nargs="+", required=True, metavar="TASK", help="one or more; see below")
    add(
        "--data", action="append", default=[], metavar="[TASK=]FILE",
        help="a task's data, compressed or not; of perplexity also a folder that prepare or train "
        "made, whose held-out part is scored (the default for the model of a run); may be repeated",
    )  # fmt: skip
    add("--limit", type=_count, metavar="N", help="only the first N examples of each task")
    add(
        "--context", type=_count, metavar="N",
        help="of texts: tokens in a window (default: as many as the model reads)",
    )  # fmt: skip
    add(
        "--stride", type=_count, metavar="N",
        help="of texts: tokens that a window predicts (default: all of them)",
    )  # fmt: skip
    add(
        "--first-token", choices=("predict", "skip"),
        help="of texts: predict the first token, from the end-of-text token, or leave it out "
        "(default: predict, where there is such a token)",
    )  # fmt: skip
    add(
        "--batch-size", type=_count, default=16, metavar="N",
        help="sequences read at once (default %(default)s)",
    )  # fmt: skip
    add("--json", metavar="FILE", help="write the scores as JSON too; - is standard output, alone")
    add("--adapter", metavar="NAME", help="LoRA adapters of the model, in PEFT's format")
    add("--tokenizer", metavar="NAME", help="where the tokenizer is, if not with the model")
    add("--preset", help="architecture of a bare state dict: gpt2, gpt2-medium, …")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    add(
        "--dtype", choices=("float32", "bfloat16", "float16", "float64"),
        help="of the weights; default: as stored, but at least float32 on a CPU",
    )  # fmt: skip
    add("--quantize", choices=("int8", "int4"), help="weights of 8 or 4 bits, on a CPU")
    add("--backend", default="auto", help="implementation of the ops: auto (default), reference, …")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


_count.__name__ = "integer"  # argparse says "invalid integer value"


if __name__ == "__main__":
    sys.exit(main())
