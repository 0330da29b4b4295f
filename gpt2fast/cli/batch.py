"""--prompts-file with --out: many prompts, whose results stay whatever happens on the way."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .._system.output import complain, note
from ..errors import Error
from ..sampling import overridden
from .prompt_progress import PromptProgress
from .prompts import BadLine, Prompt
from .results import as_object
from .results_file import job_of, results_file

if TYPE_CHECKING:
    from ..inference.generator import Generator

_OF_THE_MODEL = ("model", "preset", "adapter", "tokenizer", "dtype", "quantize", "window")


def write_results(
    generator: Generator,
    content: bytes,
    lines: Sequence[Prompt | BadLine],
    shared: Mapping[str, Any],
    args: argparse.Namespace,
) -> tuple[int, PromptProgress]:
    """Append to the file of `args.out` what is missing there.

    Args:
        generator: continues the prompts.
        content: of the file of prompts.
        lines: what is on its lines.
        shared: options of all prompts.
        args: those of the command line.

    Returns:
        The exit code, 1 if a line has an error; and the times of the steps.
    """
    copies = args.num_samples
    job = job_of(generator, content, shared, {name: getattr(args, name) for name in _OF_THE_MODEL})
    numbers = [line.index or 0 for line in lines]
    with results_file(args.out, job, numbers, copies) as file:
        begin = file.done
        if begin:
            left = f"; {len(lines) - begin} are left" if begin < len(lines) else ", which are all"
            note(f"{args.out} has the results of {begin} prompts{left}")
        checked = [_checked(generator, line, shared, args.prompts_file) for line in lines]
        limits = [limit for limit, _ in checked[begin:] for _ in range(copies)]
        progress = PromptProgress(limits, elsewhere=args.progress)
        asked = [line for _, line in checked if isinstance(line, Prompt)]
        done = sum(isinstance(line, Prompt) for _, line in checked[:begin])
        results = generator.run(
            [(line.text, overridden(shared, line.options)) for line in asked],
            done=done,
            timing=progress,
        )
        for _, line in checked[begin:]:
            found = line.error if isinstance(line, BadLine) else next(results)
            if isinstance(found, Error) or isinstance(line, BadLine):
                text = " ".join(str(found).split())
                file.add([{"index": line.index, **line.labels, "error": text}])
                progress.add_failure(copies)
            else:
                file.add([as_object(generator, line, one, n) for n, one in enumerate(found)])
                for one in found:
                    progress.add_result(one)
        progress.end()
        if file.failed:
            complain(
                f"error: {file.failed} of {len(lines)} prompts have no result; see the lines with "
                f'an "error" in {args.out}'
            )
        return int(file.failed > 0), progress


def _checked(
    generator: Generator, line: Prompt | BadLine, shared: Mapping[str, Any], name: str
) -> tuple[int, Prompt | BadLine]:
    """The most tokens that a prompt may get, and the prompt, or what is wrong with it."""
    if isinstance(line, BadLine):
        return 0, line
    place = f"{name}, line {(line.index or 0) + 1}"
    try:
        return generator.check(line.text, place, **overridden(shared, line.options)), line
    except Error as error:
        return 0, BadLine(line.index or 0, line.labels, error)
