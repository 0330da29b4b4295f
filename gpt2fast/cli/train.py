"""Train or fine-tune a GPT-2:

  gpt2fast train --config shakespeare_char --data my.txt

Settings come from a YAML file (--config: a shipped recipe or a path) and from flags, which win.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from .._system.files import atomic_write_text
from .._system.invocation import as_called, command_line
from .._system.output import complain
from .._system.parsing import read_yaml
from ..checkpoints.run_folder import SETTINGS
from ..errors import ArgumentError, ConfigError, Error, did_you_mean
from .arguments import ParagraphFormatter, hyphenated, text_argument
from .command import command

if TYPE_CHECKING:
    from ..training.config import TrainConfig

_TEXTS = ("text_field", "sample_prompt", "wandb")
"""Settings that are texts; other strings name files, or one of a few words."""
_SECTIONS = {
    "data": "data",
    "init_from": "model",
    "lora_rank": "fine-tuning",
    "max_steps": "optimization",
    "eval_interval": "evaluation, log and checkpoints",
    "seed": "machine",
}
"""First field of each section of the help."""


def recipes() -> dict[str, Path]:
    """Shipped configurations by name."""
    folder = Path(str(files("gpt2fast") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_path(name: str) -> Path:
    """The YAML file meant by --config: a path, or the name of a shipped recipe."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = recipes()
    if name in shipped:
        return shipped[name]
    raise ConfigError(
        f"--config {name!r} is neither a file nor a shipped recipe ({', '.join(shipped)})"
    )


def _checked_recipe(path: Path) -> str:
    """The path of a YAML file that the parser below can stand, and that asks for no other file."""
    values = read_yaml(path)
    if isinstance(values, dict) and "config" in values:
        raise ConfigError(f"{path}: config is a flag, not a setting of a recipe; use --config")
    return str(path)


def _parser() -> Any:
    from jsonargparse import ActionConfigFile, ArgumentParser

    from ..training.config import TrainConfig, field_help

    parser = ArgumentParser(
        prog=command_line("train"),
        usage="%(prog)s [--config NAME] [--SETTING VALUE ...] [--resume]",
        description=as_called(__doc__ or ""),
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, metavar="NAME|PATH",
        help=f"recipe ({', '.join(recipes())}) or YAML file",
    )  # fmt: skip
    parser.add_argument(
        "--resume", metavar="[PATH]",
        help="continue a run: its folder or one of its checkpoints (without PATH: the run in OUT)",
    )  # fmt: skip
    hints, texts = get_type_hints(TrainConfig), field_help()
    group: Any = parser
    for field in fields(TrainConfig):
        if field.name in _SECTIONS:
            group = parser.add_argument_group(_SECTIONS[field.name])
        kind, shown = _kind(hints[field.name])
        alone: dict[str, Any] = {"nargs": "?", "const": True} if kind is bool else {}
        group.add_argument(
            "--" + field.name,
            # Only text keeps its type: `--out 2024` is a name. The rest is read as YAML, and
            # TrainConfig says what is wrong with it.
            type=hints[field.name] if kind is str else Any,
            default=field.default,
            metavar=shown,
            help=texts[field.name] + _default_shown(field.default, texts[field.name]),
            **alone,
        )
    return parser


def _default_shown(default: Any, text: str) -> str:
    if default is None or default is False or "default" in text:
        return ""
    return f" (default {default})"


def _kind(hint: Any) -> tuple[type, str]:
    """The type of a field, None aside, and how the help shows its values."""
    if get_origin(hint) is not Literal:
        hint = next((option for option in get_args(hint) if option is not type(None)), hint)
    if get_origin(hint) is Literal:
        return Literal, "|".join(get_args(hint))
    shown = {int: "INTEGER", float: "NUMBER", str: "NAME", bool: "[true|false]"}
    containers = {dict: "MAPPING", list: "TOKEN ..."}
    return hint, containers.get(get_origin(hint)) or shown[hint]


class _HelpFormatter(ParagraphFormatter):
    """Flags with hyphens, as they are usually typed; defaults where there are any."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = ", ".join(map(hyphenated, action.option_strings))
        return flags if action.nargs == 0 else f"{flags} {action.metavar or ''}".rstrip()


def parse(argv: Sequence[str]) -> tuple[TrainConfig, Path | None]:
    """The run's settings, and the checkpoint to resume from, if any.

    What counts more comes later: the settings of the run that is resumed, the recipe, flags.
    """
    import jsonargparse

    from ..training.checkpoints.folder import find_checkpoint
    from ..training.config import TrainConfig

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", action="append", default=[])
    first.add_argument("--resume", nargs="?", const="")
    try:
        given = _tokens_of(_mixture_of([_underscored(argument) for argument in argv]))
        chosen, flags = first.parse_known_args(given)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None
    _check_names(flags)
    parser = _parser()
    arguments = []
    for name in chosen.config:
        arguments += ["--config", _checked_recipe(recipe_path(name))]
    arguments += flags + _others_off(flags)

    def settings(arguments: list[str]) -> TrainConfig:
        try:
            values = parser.parse_args(arguments).as_dict()
        except (jsonargparse.ArgumentError, UnicodeDecodeError) as error:
            files = "".join(f" (in {item})" for item in arguments if item.endswith(".yaml"))
            raise ConfigError(" ".join(str(error).split()) + files) from None
        for name in _TEXTS:
            if isinstance(values[name], str):
                try:
                    values[name] = text_argument(values[name])
                except argparse.ArgumentTypeError as error:
                    raise ConfigError(f"{name} is wrong: {error}") from None
        if values["resume"] is not None:
            raise ConfigError("resume is a flag, not a setting of a recipe; use --resume PATH")
        return TrainConfig(**{field.name: values[field.name] for field in fields(TrainConfig)})

    if chosen.resume is None:
        return settings(arguments), None
    checkpoint = find_checkpoint(Path(chosen.resume or settings(arguments).out))
    run = checkpoint.parent.parent
    if (run / SETTINGS).exists():
        kept = _checked_recipe(run / SETTINGS)
        arguments = ["--config", kept, "--out", str(run), *arguments]
    elif not chosen.config:
        raise ConfigError(
            f"{run / SETTINGS}, which holds the settings of the run, is missing; name a file "
            "or recipe that has them: --config NAME"
        )
    return settings(arguments), checkpoint


def _check_names(flags: list[str]) -> None:
    from ..training.config import TrainConfig

    known = ["--" + field.name for field in fields(TrainConfig)]
    for flag in flags:
        name = flag.partition("=")[0]
        if name.startswith("--") and name not in (*known, "--help"):
            shown = [hyphenated(option) for option in (name, *known)]
            hint = did_you_mean(shown[0], shown[1:])
            raise ConfigError(f"there is no option {shown[0]}{hint} (--help lists all options)")


def _others_off(flags: list[str]) -> list[str]:
    """--max-epochs replaces a recipe's max_steps, --data its dataset, and so on."""
    from ..training.config import DATA_SOURCES, LENGTHS

    given = {flag.partition("=")[0].removeprefix("--") for flag in flags}
    off: list[str] = []
    for choices in (LENGTHS, DATA_SOURCES):
        if len(given & set(choices)) == 1:
            off += [name for name in choices if name not in given]
    if given & set(DATA_SOURCES) and "dataset_config" not in given:
        off.append("dataset_config")
    return [part for name in off for part in (f"--{name}", "null")]


def _mixture_of(arguments: list[str]) -> list[str]:
    """`--data a.txt=0.7 b.txt=0.3` as `--mixture {"a.txt": 0.7, "b.txt": 0.3}`."""
    from ..data.inputs import parse_weights
    from ..errors import DataError

    place, end, named = _values_of("--data", arguments)
    if place is None:
        return arguments
    try:
        found = parse_weights(named)
    except DataError as error:
        raise ConfigError(str(error)) from None
    if isinstance(found, dict):
        return [*arguments[:place], "--mixture", json.dumps(found), *arguments[end:]]
    if len(named) > 1:
        raise ConfigError(
            f"--data has {len(named)} values without weights; write {named[0]}=0.5 "
            f"{named[1]}=0.5, say, or put the files in one folder"
        )
    return arguments


def _tokens_of(arguments: list[str]) -> list[str]:
    """`--add_tokens A B` as `--add_tokens ["A", "B"]`, whatever characters they have."""
    place, end, tokens = _values_of("--add_tokens", arguments)
    if place is None or tokens == ["null"]:
        return arguments
    return [*arguments[:place], "--add_tokens", json.dumps(tokens), *arguments[end:]]


def _values_of(flag: str, arguments: list[str]) -> tuple[int | None, int, list[str]]:
    """A flag's index among the arguments, the index after its last value, and its values."""
    place = next((i for i, a in enumerate(arguments) if a.partition("=")[0] == flag), None)
    if place is None:
        return None, 0, []
    _, joined, first = arguments[place].partition("=")
    values = [first] if joined else []
    end = place + 1
    while end < len(arguments) and not arguments[end].startswith("--"):
        values.append(arguments[end])
        end += 1
    return place, end, values


def _underscored(argument: str) -> str:
    """`--max-steps=3` as `--max_steps=3`, the way TrainConfig spells it."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _of_this_process(error: Error) -> Error:
    """The failure as one of several processes reports it, which is told to torchrun, too."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return error
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        atomic_write_text(
            report, json.dumps({"message": str(error), "timestamp": int(time.time())})
        )
    return type(error)(f"[process {os.environ['RANK']}] {error}")


@command(mistakes=(ArgumentError, ConfigError), interrupted="stopped")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    config, resume = parse(sys.argv[1:] if argv is None else argv)

    from ..training import Interrupted, train
    from ..training.distributed import FailedElsewhere, is_main_process
    from ..training.machine.allocator import keep_freed_memory

    keep_freed_memory()
    try:
        train(config, resume)
    except Interrupted as stop:
        if is_main_process():
            complain(str(stop))
        return 128 + stop.signum
    except FailedElsewhere:
        return 1
    except Error as error:
        raise _of_this_process(error) from error
    return 0
