"""A study: trial after trial, each a training run with settings of the space.

Any number of processes can run trials of one study: what they share is its database.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import math
import shlex
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .._system.files import atomic_write_text
from .._system.lock import only_process
from .._system.output import tell, warn
from .._system.parsing import read_yaml
from .._system.tables import setting
from ..checkpoints import run_folder
from ..data import DataModule
from ..errors import ConfigError, Error
from ..training import Interrupted, TrainConfig, TrainResult, train
from ..training.config import DATA_SETTINGS
from ..training.start.data import located, prepared_data, source_of
from .database import (
    StudyError,
    counted,
    one_line,
    open_study,
    recover_lost_trials,
    require_optuna,
    require_same,
    run_again,
    sign,
    storage_failures_explained,
)
from .search import make_pruner, make_sampler
from .space import MACHINE, REPORTING, Space
from .trials import DIGITS

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

_log = logging.getLogger(__name__)

STUDY_FILE = "study.yaml"
BEST_FILE = "best.yaml"
_MOST_FAILURES = 10
"""Failures in a row that end the study: something other than the settings must be wrong."""

Train = Callable[..., TrainResult]


@dataclass(frozen=True)
class StudyConfig:
    """Settings of a study."""

    base: TrainConfig
    """Settings that all trials have in common."""
    space: Space
    out: Path
    trials: int = 50
    """The study ends at this number of finished trials, counting those before it was resumed."""
    storage: str | None = None
    """Database URL; None: OUT/study.db."""
    name: str = "study"
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["hyperband", "median", "none"] = "hyperband"
    hours: float | None = None
    """No trial begins later than this."""
    keep_checkpoints: bool = False


class Stopped(Exception):
    """A signal ended the study; its trial is queued again."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def tune(settings: StudyConfig, train: Train = train) -> Study:
    """Run trials until the study has `settings.trials`; other processes may do the same.

    Args:
        settings: the study's settings.
        train: runs a trial; called like `gpt2fast.training.train`.

    Raises:
        ConfigError: settings, space, storage or folder are wrong, or another study's.
        StudyError: the storage fails, or one trial after the other.
        Stopped: a signal of `stopping.STOPPING`; the trial that ran is queued again.
    """
    require_optuna()
    with storage_failures_explained():
        return _StudyRun(settings, train).run()


class _StudyRun:
    def __init__(self, settings: StudyConfig, train: Train) -> None:
        self.settings, self.train = settings, train
        self.base, self.space, self.out = settings.base, settings.space, settings.out
        self.trials = self.out / "trials"
        self.turn = ExitStack()
        """Holds the lock that keeps other workers of this folder from taking a trial."""
        self._lock = self.out / ".lock"
        self.number = -1
        self.signum: int | None = None
        possible = self.space.possible(self.base)
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out is {str(self.out)!r}, which is a file; name a folder")
        if (self.out / run_folder.LOG).exists():
            raise ConfigError(
                f"--out is {str(self.out)!r}, the folder of a training run; name one of its own"
            )
        self.trials.mkdir(parents=True, exist_ok=True)
        with only_process(self._lock):
            self._prepare(possible)

    # -- setting up --------------------------------------------------------------------------

    def _prepare(self, possible: list[TrainConfig]) -> None:
        import yaml

        settings = self.settings
        asked: dict[str, Any] = {"space": self.space.to_dict(), "config": _compared(self.base)}
        file = self.out / STUDY_FILE
        kept = read_yaml(file) if file.exists() else {}
        if not isinstance(kept, dict):
            raise ConfigError(f"{file} is damaged; delete it, or name another --out")
        config = dataclasses.replace(self.base, out=str(self.out))
        there = (self.out / "data" / "meta.json").is_file()
        # If the text is prepared here, other workers know only the prepared data.
        known = {"source": source_of(config)} if there else {}
        require_same(kept, {**asked, **known}, f"the study in {self.out}")
        data = prepared_data(config, resuming=there)
        module = DataModule(
            data,
            config.block_size,
            config.batch_size,
            seed=config.seed,
            notify=functools.partial(warn, _log),
        )
        url = settings.storage or _sqlite(self.out / "study.db")
        study = open_study(url, settings.name, None, None)
        begun = study.user_attrs
        require_same(begun, asked, f"study {settings.name!r}")
        strangers = next(self.trials.iterdir(), None)
        if strangers is not None and not study.get_trials(deepcopy=False):
            raise ConfigError(
                f"{strangers} is of another study, and study {settings.name!r} has no trial yet; "
                "name another --out, or delete that folder"
            )
        tokens = module.meta.train_tokens
        identity = {
            name: getattr(module.meta, name)
            for name in ("tokenizer_fingerprint", "vocab_size", "train_tokens", "val_tokens")
        }
        asked["data"] = identity
        require_same(begun, asked, f"study {settings.name!r}")
        for part, values in asked.items():
            if part not in begun:
                study.set_user_attr(part, values)
        asked["source"] = source_of(config)
        atomic_write_text(file, yaml.safe_dump(asked, sort_keys=False))

        none: dict[str, Any] = dict.fromkeys(("data", "mixture", "dataset", "dataset_config"))
        source = {"mixture": data} if isinstance(data, dict) else {"data": str(data)}
        self.common = dataclasses.replace(self.base, **{**none, **source})
        self.tokens = tokens
        longest = max(config.steps(tokens) for config in possible)
        study.sampler = make_sampler(settings.sampler, self.base.seed)
        study.pruner = make_pruner(settings.pruner, self.base.eval_interval, longest)
        self.study = study

    # -- running -----------------------------------------------------------------------------

    def run(self) -> Study:
        """Trial after trial."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        study, settings = self.study, self.settings
        begun, failures = time.monotonic(), 0
        while settings.hours is None or time.monotonic() - begun < settings.hours * 3600:
            with self.turn:
                if not self._take_turn():
                    break
                try:
                    study.optimize(self._objective, n_trials=1, catch=(Exception,))
                except KeyboardInterrupt:
                    self.signum = self.signum or signal.SIGINT
                except UpdateFinishedTrialError:
                    tell(
                        _log,
                        f"trial {self.number}: given up as lost, since its worker had sent no sign "
                        "of life; it will run again",
                    )
                    continue
            trial = study.get_trials(deepcopy=False)[self.number]
            if trial.state != TrialState.COMPLETE:
                gc.collect()  # the traceback may keep its model alive
            if self.signum is not None:
                run_again(study, trial, lost=False)
                raise Stopped(
                    self.signum,
                    f"stopped; trial {trial.number} will run again. Continue with the same command",
                )
            self._account(trial)
            failures = failures + 1 if trial.state == TrialState.FAIL else 0
            if failures == _MOST_FAILURES:
                raise StudyError(
                    f"{failures} trials in a row have failed, the last one: "
                    f"{trial.user_attrs.get('error')}. Their folders are in {self.trials}; give "
                    "the same command again to go on"
                )
        return study

    def _take_turn(self) -> bool:
        """Take the lock; True if there is a trial to run."""
        from optuna.trial import TrialState

        self.turn.enter_context(only_process(self._lock))
        recover_lost_trials(self.study)
        trials = self.study.get_trials(deepcopy=False)
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        missing = self.settings.trials - len(counted(trials))
        if missing > running:
            return True
        if missing > 0:
            tell(
                _log,
                f"{running} of the last trials are run by other workers; if one of them was "
                "killed, give the same command again in two minutes",
            )
        return False

    def _objective(self, trial: Trial) -> float:
        """Train with settings that the sampler suggests; the lowest validation loss."""
        from optuna import TrialPruned

        self.number = trial.number
        sign(trial)
        self.turn.close()
        folder = self.trials / f"{trial.number:04}"
        try:
            folder.mkdir()
            values = self.space.suggest(trial)
            shown = "  ".join(f"{name} {setting(value, DIGITS)}" for name, value in values.items())
            tell(_log, f"trial {trial.number}: {shown}")
            config = dataclasses.replace(
                self.common,
                out=str(folder),
                **values,  # type: ignore[arg-type]
            )
            with (
                open(folder / "output.log", "w", encoding="utf-8") as output,
                redirect_stdout(output),
            ):
                try:
                    return self._trained(trial, config)
                except Exception as error:
                    if not isinstance(error, (Error, TrialPruned, Interrupted)):
                        traceback.print_exc(file=output)
                    raise
        except TrialPruned:
            raise
        except Interrupted as stop:
            self.signum = stop.signum
            trial.set_user_attr("error", "stopped")
            raise
        except Exception as error:
            name = "" if isinstance(error, Error) else f"{type(error).__name__}: "
            trial.set_user_attr("error", name + one_line(error))
            raise

    def _trained(self, trial: Trial, config: TrainConfig) -> float:
        from optuna import TrialPruned

        last = config.steps(self.tokens)

        def on_validation(step: int, loss: float) -> None:
            if step == 0:  # untrained
                return
            trial.report(loss, step)
            if step < last and trial.should_prune():
                raise TrialPruned(f"at step {step}")

        loss = self.train(config, on_validation=on_validation).best_val_loss
        if not math.isfinite(loss):
            raise StudyError(f"the lowest validation loss is {loss}")
        return loss

    # -- after a trial -----------------------------------------------------------------------

    def _account(self, trial: FrozenTrial) -> None:
        """Report its result, write the best settings, delete weights that are not kept."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        best = best_of(trials)
        if trial.state == TrialState.COMPLETE:
            mark = ", the best so far" if best is not None and best.number == trial.number else ""
            ended = f"{trial.value:.4f}{mark}"
        elif trial.state == TrialState.PRUNED:
            ended = f"pruned at step {trial.last_step}, {trial.value:.4f}"
        else:
            ended = f"failed: {trial.user_attrs.get('error')}"
        seconds = 0.0 if trial.duration is None else trial.duration.total_seconds()
        tell(_log, f"trial {trial.number}: {ended} ({seconds:,.0f} s)")
        if best is not None:
            self._write_best(best)
        if not self.settings.keep_checkpoints:
            for other in trials:
                if other.state.is_finished() and (best is None or other.number != best.number):
                    self._drop_weights(other.number)

    def _write_best(self, best: FrozenTrial) -> None:
        import yaml

        # The data as they were named, so that the file works without this folder, too.
        values = dataclasses.replace(
            self.base, **located(self.base), **best.params, out=str(self.out / "best")
        ).to_dict()
        path = self.out / BEST_FILE
        text = (
            f"# Trial {best.number} of study {self.settings.name}: validation loss "
            f"{best.value:.4f}\n#   python -m gpt2fast.train --config {shlex.quote(str(path))}\n"
            + yaml.safe_dump(values, sort_keys=False)
        )
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            atomic_write_text(path, text)

    def _drop_weights(self, number: int) -> None:
        folder = self.trials / f"{number:04}"
        for name in run_folder.WEIGHTS:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name, ignore_errors=True)
            else:
                with suppress(OSError):
                    (folder / name).unlink(missing_ok=True)


def best_of(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The completed trial with the lowest loss, the earlier one of two."""
    from optuna.trial import TrialState

    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return min(complete, key=lambda t: (t.value or 0.0, t.number)) if complete else None


def _compared(base: TrainConfig) -> dict[str, Any]:
    """The settings that all workers of a study must share, except for the data."""
    left_out = {*DATA_SETTINGS, *MACHINE, *REPORTING} - {"eval_interval", "eval_batches"}
    return {name: value for name, value in base.to_dict().items() if name not in left_out}


def _sqlite(path: Path) -> str:
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(path.resolve())).render_as_string()
