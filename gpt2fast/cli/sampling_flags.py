"""Flags of the options of choosing tokens, which follow from the fields of `SamplingOptions`."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from typing import Any

from .._system.docstrings import field_docstrings
from .._system.output import note
from ..errors import GenerationError, shown
from ..sampling import DEFAULTS, OF_CHECKPOINT, PROCESSORS, STEPWISE, SamplingOptions
from .arguments import optional, text_argument
from .command import UsageError

_CHOICES = {**PROCESSORS, **STEPWISE}
_LENGTHS: dict[str, type[float]] = {
    "max_new_tokens": int, "max_length": int, "min_new_tokens": int, "max_time": float,
}  # fmt: skip

OF_A_TEXT: dict[str, type[float]] = {
    **_LENGTHS,
    **{name: processor.kind for name, processor in _CHOICES.items()},
    "seed": int,
}
"""Options that each text may have its own of, in a conversation or a file of prompts; types."""

_BY_CHANCE = (*(name for name, option in _CHOICES.items() if not option.reads_history), "seed")
_OPTIONAL = (*OF_A_TEXT, "num_beams", "length_penalty")


def flag(name: str) -> str:
    """The flag of an option."""
    return "--" + name.replace("_", "-")


def add_sampling_flags(parser: argparse._ActionsContainer) -> None:
    """Add a flag for each option; what is not given stays out of the namespace."""
    add, unset = parser.add_argument, argparse.SUPPRESS
    texts = field_docstrings(SamplingOptions)
    add("--greedy", action="store_true", help="always the likeliest token")
    add("--do-sample", action="store_true", help="draw at random (default)")
    for name, processor in _CHOICES.items():
        short, text, default = name[-2:], texts[name].rstrip("."), getattr(DEFAULTS, name)
        metavar = short[1].upper() if short[0] == "_" else "N" if processor.kind is int else "X"
        shown = text[0].lower() + text[1:] + ("" if default is None else f" (default {default})")
        kind = optional(processor.kind)
        add(flag(name), type=kind, default=unset, metavar=metavar, help=shown)
    add(
        "--logit-bias", action="append", type=_bias, metavar="ID=BIAS",
        help="add a number from -100 to 100 to the score of the token with this id; may be "
        "repeated",
    )  # fmt: skip
    add(
        "--bad-words", action="append", type=text_argument, metavar="TEXT",
        help="never write this text, be it after a space or not; may be repeated",
    )  # fmt: skip
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


def add_length_flags(parser: argparse._ActionsContainer) -> None:
    """Add a flag for each option of length; what is not given stays out of the namespace."""
    texts = field_docstrings(SamplingOptions)
    for name, kind in _LENGTHS.items():
        text = with_flags(texts[name].partition("; None")[0].rstrip("."))
        if name == "max_new_tokens":
            text += f" (default {DEFAULTS.max_new_tokens}, or as generation_config.json says)"
        parser.add_argument(
            flag(name), *(["--max-tokens"] if name == "max_new_tokens" else []),
            type=int if name == "max_new_tokens" else optional(kind), default=argparse.SUPPRESS,
            metavar="N" if kind is int else "SECONDS", help=text[0].lower() + text[1:],
        )  # fmt: skip


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a token id and a number, as in 50256=-100"
        ) from None


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `SamplingOptions`; what was not given is as a `Generator` has it, or left out where
    the model's generation_config.json may say it.

    Raises:
        UsageError: an option is out of its range, or has no meaning beside another one.
    """
    given = {name: getattr(args, name) for name in _OPTIONAL if name in args}
    contrastive = bool(given.get("penalty_alpha"))
    if contrastive and (args.greedy or args.do_sample):
        other = "--greedy" if args.greedy else "--do-sample"
        raise UsageError(
            f"--penalty-alpha and {other} contradict each other: leave one of them out"
        )
    draws = not args.greedy and args.num_beams == 1 and not contrastive
    of_others = ("top_k",) if contrastive else ()
    without_effect = [flag(x) for x in _BY_CHANCE if x in given and x not in of_others]
    if without_effect and not draws:
        note(f"{', '.join(without_effect)}: no effect without sampling")
    options = {
        **{name: x for name, x in asdict(DEFAULTS).items() if name not in OF_CHECKPOINT},
        **({"top_k": None} if contrastive else {}),
        **given,
        "logit_bias": None if args.logit_bias is None else dict(args.logit_bias),
        "num_return_sequences": args.num_samples,
        "do_sample": draws or args.do_sample,
    }
    if args.num_samples > 1 and args.num_beams == 1 and not (draws and options["temperature"] != 0):
        raise UsageError(
            f"--num-samples is {args.num_samples}, and greedy decoding has one continuation only: "
            "leave out --greedy and --temperature 0, or raise --num-beams too"
        )
    try:
        DEFAULTS.of_call({}, options)
    except GenerationError as error:
        raise UsageError(with_flags(str(error))) from None
    return options


def with_flags(message: str) -> str:
    """A message about options as the library names them, with their names here."""
    message = message.replace("num_return_sequences", "num_samples")
    message = message.replace("bad_words_ids", "bad_words")
    for name in (*_OPTIONAL, "num_samples", "logit_bias", "bad_words"):
        message = re.sub(rf"(?<![\w-]){name}(?!\w)", flag(name), message)
    return message
