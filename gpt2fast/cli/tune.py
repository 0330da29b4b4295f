"""Tune the settings of a training run: `gpt2fast tune --space lr --data book.txt`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .._system.invocation import command_line
from .._system.output import complain, say
from ..errors import ConfigError
from .arguments import CommandParser, text_argument
from .command import command

if TYPE_CHECKING:
    from ..tuning.study import StudyConfig

EXAMPLES = """\
examples:
  gpt2fast tune --space lr --config shakespeare_cpu --trials 20 --out tuning/lr
      the learning rate of a recipe; the same command again goes on where it was
  gpt2fast tune --space mine.yaml --data book.txt --max-steps 500 --out tuning/mine
      a space of your own; flags of `gpt2fast train` say what the trials have in common
  gpt2fast tune --space optimizer --config owt --out tuning/owt \\
          --storage postgresql+psycopg2://me@host/studies --study-name owt
      the same command on many machines shares one study

A space is a YAML file with a setting a line:
  lr: {low: 1e-4, high: 1e-2, log: true}
  optimizer: [adamw, muon]
  momentum: {low: 0.8, high: 0.99, when: {optimizer: muon}}

OUT gets best.yaml (settings for `gpt2fast train --config`), report.html, history.png,
importances.png, and a folder for each trial in trials/."""
_MOST_ROWS = 20


def _parser() -> argparse.ArgumentParser:
    from ..tuning.space import spaces

    parser = CommandParser(
        "tune",
        usage="%(prog)s --space NAME [option ...] [--SETTING VALUE]",
        description="Look for the settings of a training run with the lowest validation loss. "
        "Every option that is not listed here is one of `gpt2fast train` (--config, --data, "
        "--max-steps, …), for all trials.",
        epilog=EXAMPLES,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--space", required=True, metavar="NAME|PATH",
        help=f"settings to try: a shipped space ({', '.join(spaces())}) or a YAML file",
    )  # fmt: skip
    add(
        "--trials", type=int, default=50, metavar="N",
        help="finished trials at which the study ends, earlier ones counted (default: 50); "
        "0 writes the report of what is there",
    )  # fmt: skip
    add("--out", default="tuning", metavar="DIR", help="folder of the study (default: tuning)")
    add(
        "--storage", metavar="URL",
        help="database of the study, such as sqlite:///study.db (default: DIR/study.db)",
    )  # fmt: skip
    add(
        "--study-name", type=text_argument, default="study", metavar="NAME",
        help="its name there (default: study)",
    )  # fmt: skip
    add(
        "--sampler", choices=("tpe", "random"), default="tpe",
        help="proposes settings (default: tpe); --seed seeds it as well as the training",
    )  # fmt: skip
    add(
        "--pruner", choices=("hyperband", "median", "none"), default="hyperband",
        help="ends trials whose validation losses are behind (default: hyperband)",
    )  # fmt: skip
    add("--timeout-hours", type=float, metavar="H", help="begin no trial after this time")
    add(
        "--keep-checkpoints", action="store_true",
        help="keep the weights of every trial, not just of the best one",
    )  # fmt: skip
    return parser


def settings_of(argv: Sequence[str]) -> StudyConfig:
    """The study that the command line asks for.

    Raises:
        ConfigError: a mistake in the settings or the space.
    """
    from ..tuning.space import read_space
    from ..tuning.study import StudyConfig
    from . import train

    parser = _parser()
    options, others = parser.parse_known_args(argv)
    if options.trials < 0:
        parser.error(f"--trials is {options.trials}, but must be 0 or more")
    hours = options.timeout_hours
    if hours is not None and not (hours > 0 and math.isfinite(hours)):
        parser.error(f"--timeout-hours is {hours:g}, but must be above 0")
    if options.out == "" or options.study_name == "":
        parser.error("--out and --study-name need a name")
    if any(argument.partition("=")[0] == "--resume" for argument in others):
        parser.error("--resume is for training; a study goes on with the same command")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a trial runs in one process; start this command several times instead")
    base, _ = train.parse(others)
    return StudyConfig(
        base=base,
        space=read_space(options.space),
        out=Path(options.out),
        trials=options.trials,
        storage=options.storage,
        name=options.study_name,
        sampler=options.sampler,
        pruner=options.pruner,
        hours=hours,
        keep_checkpoints=options.keep_checkpoints,
    )


@command(mistakes=(ConfigError,), interrupted="stopped; the same command goes on where it was")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    settings = settings_of(sys.argv[1:] if argv is None else argv)

    from ..training.machine.allocator import keep_freed_memory
    from ..tuning.study import Stopped, tune

    keep_freed_memory()
    try:
        study = tune(settings)
    except Stopped as stop:
        complain(str(stop))
        return 128 + stop.signum
    _tell(study, settings)
    return _code(study, settings)


def _tell(study: object, settings: StudyConfig) -> None:
    from optuna import Study

    from .._system.tables import table_lines
    from ..tuning.report import FEWEST_TRIALS, write_report
    from ..tuning.study import BEST_FILE
    from ..tuning.trials import ranked, trial_table

    assert isinstance(study, Study)
    trials = ranked(study.get_trials(deepcopy=False))
    titles, rows = trial_table(trials[:_MOST_ROWS], [p.name for p in settings.space.parameters])
    say("")
    for line in table_lines(titles, rows, left=len(titles)) if rows else ["no trial yet"]:
        say(line)
    if len(trials) > _MOST_ROWS:
        say(f"… and {len(trials) - _MOST_ROWS} more in the report")
    written = write_report(study, settings.space, settings.out)
    say("")
    for path in written:
        say(str(path))
    if not any(path.name == "importances.png" for path in written):
        say(f"no importances: they need two settings and {FEWEST_TRIALS} completed trials")
    best = settings.out / BEST_FILE
    if best.is_file():
        say(f"train with the best settings:\n  {command_line('train')} --config {best}")


def _code(study: object, settings: StudyConfig) -> int:
    """1 where every trial failed."""
    from optuna import Study
    from optuna.trial import TrialState

    assert isinstance(study, Study)
    states = {trial.state for trial in study.get_trials(deepcopy=False)}
    if TrialState.FAIL not in states or states & {TrialState.COMPLETE, TrialState.PRUNED}:
        return 0
    complain(f"error: every trial failed; {settings.out / 'trials'} has an output.log of each")
    return 1
