"""Flags of the options of choosing tokens, which follow from the fields of `SamplingOptions`."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from typing import Any

from .._system.docstrings import field_docstrings
from .._system.output import note
from ..errors import GenerationError
from ..sampling import DEFAULTS, PROCESSORS, SamplingOptions
from .arguments import optional
from .command import UsageError

OF_A_TEXT: dict[str, type[float]] = {
    "max_new_tokens": int,
    **{name: processor.kind for name, processor in PROCESSORS.items()},
    "seed": int,
}
"""Options that each text may have its own of, in a conversation or a file of prompts; types."""

_BY_CHANCE = (*(name for name, option in PROCESSORS.items() if not option.reads_history), "seed")
_OPTIONAL = (*PROCESSORS, "seed", "num_beams", "length_penalty")


def flag(name: str) -> str:
    """The flag of an option."""
    return "--" + name.replace("_", "-")


def add_sampling_flags(parser: argparse._ActionsContainer) -> None:
    """Add a flag for each option; what is not given stays out of the namespace."""
    add, unset = parser.add_argument, argparse.SUPPRESS
    texts = field_docstrings(SamplingOptions)
    add("--greedy", action="store_true", help="always the likeliest token")
    add("--do-sample", action="store_true", help="draw at random (default)")
    for name, processor in PROCESSORS.items():
        short, text, default = name[-2:], texts[name].rstrip("."), getattr(DEFAULTS, name)
        metavar = short[1].upper() if short[0] == "_" else "N" if processor.kind is int else "X"
        shown = text[0].lower() + text[1:] + ("" if default is None else f" (default {default})")
        kind = optional(processor.kind)
        add(flag(name), type=kind, default=unset, metavar=metavar, help=shown)
    add("--seed", type=optional(int), default=unset, metavar="N", help="makes the draws repeatable")
    add(
        "--num-samples", "--num-return-sequences", type=int, default=1, metavar="N",
        help="continuations of each prompt",
    )  # fmt: skip
    add("--num-beams", type=int, default=1, metavar="N", help="beam search of this width")
    add(
        "--length-penalty", type=float, default=unset, metavar="X",
        help="beam search: above 0 favors long texts, below 0 short ones (default 1)",
    )  # fmt: skip


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `SamplingOptions`; what was not given is as a `Generator` has it.

    Raises:
        UsageError: an option is out of its range, or has no meaning beside another one.
    """
    given = {name: getattr(args, name) for name in _OPTIONAL if name in args}
    draws = not args.greedy and args.num_beams == 1
    without_effect = [flag(name) for name in _BY_CHANCE if name in given]
    if without_effect and not draws:
        note(f"{', '.join(without_effect)}: no effect without sampling")
    options = {
        **asdict(DEFAULTS),
        **given,
        "max_new_tokens": args.max_new_tokens,
        "num_return_sequences": args.num_samples,
        "do_sample": draws or args.do_sample,
    }
    if args.num_samples > 1 and args.num_beams == 1 and not (draws and options["temperature"] != 0):
        raise UsageError(
            f"--num-samples is {args.num_samples}, and greedy decoding has one continuation only: "
            "leave out --greedy and --temperature 0, or raise --num-beams too"
        )
    try:
        SamplingOptions(**options)
    except GenerationError as error:
        raise UsageError(_with_flags(str(error))) from None
    return options


def _with_flags(message: str) -> str:
    """A message about options as the library names them, with their names here."""
    message = message.replace("num_return_sequences", "num_samples")
    for name in (*_OPTIONAL, "max_new_tokens", "num_samples"):
        message = re.sub(rf"(?<![\w-]){name}(?!\w)", flag(name), message)
    return message
