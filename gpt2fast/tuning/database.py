"""The study in its database: opening it, checking it, running lost trials again."""

from __future__ import annotations

import math
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._system.files import open_file
from ..errors import ConfigError, Error, shown

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

HEARTBEAT_SECONDS = 20
"""Each worker reports this often that its trial is running."""
GRACE_SECONDS = 120
"""A trial whose worker has not reported for so long is lost."""
_MOST_LOST = 3
"""Times that a trial is lost before it is given up: its settings may kill the worker."""


class StudyError(Error):
    """The database of a study fails, or the study cannot go on."""


def require_optuna() -> None:
    """Raise ConfigError unless the packages for tuning are installed."""
    try:
        import matplotlib  # noqa: F401
        import optuna
    except ImportError as error:
        raise ConfigError(
            f'tuning needs {error.name}, which is not installed: pip install "gpt2fast[tune]"'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def open_study(url: str, name: str, sampler: Any, pruner: Any) -> Study:
    """The study `name` in the database `url`, made if it is not there.

    Raises:
        ConfigError: the URL is invalid, its driver is not installed, or it cannot be opened.
        StudyError: the database is damaged, or holds something else.
    """
    import optuna
    from sqlalchemy import exc
    from sqlalchemy.engine import make_url

    try:
        parsed = make_url(url)
        place = parsed.render_as_string(hide_password=True)
        file = parsed.database if parsed.get_backend_name() == "sqlite" else None
        if file and file != ":memory:" and os.path.exists(file):
            open_file(file).close()  # a pipe would be waited for
        connect = {"timeout": 60} if parsed.get_backend_name() == "sqlite" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs={"connect_args": connect},
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=_after_loss,
            )
    except (exc.ArgumentError, ValueError):
        raise ConfigError(
            "--storage is no database URL; write sqlite:///study.db, or "
            "postgresql+psycopg2://user:password@host/database"
        ) from None
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None)
        raise ConfigError(
            f"--storage {place} needs a driver that is not installed"
            + (f": pip install {missing}" if missing else "")
        ) from None
    except exc.SQLAlchemyError as error:
        raise ConfigError(f"--storage {place} cannot be opened: {one_line(error)}") from None
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"--storage {place} cannot be opened: {reason}") from None
    except Exception as error:  # any error is possible in another program's database
        raise _strange(place, one_line(error)) from None
    try:
        study = optuna.create_study(
            study_name=name, storage=storage, sampler=sampler, pruner=pruner, load_if_exists=True
        )
        _check_content(study, place)
    except (Error, exc.SQLAlchemyError, optuna.exceptions.StorageInternalError):
        raise
    except Exception as error:  # states, distributions and values that Optuna does not know
        raise _strange(place, f"{type(error).__name__}: {one_line(error)}") from None
    return study


def _check_content(study: Study, place: str) -> None:
    """Raise StudyError where the trials are not as this program writes them."""
    from optuna.trial import TrialState

    for part, values in study.user_attrs.items():
        if not isinstance(values, dict):
            raise _strange(place, f"{shown(part)} of the study is {shown(values)}")
    for place_in_list, trial in enumerate(study.get_trials(deepcopy=False)):
        if trial.number != place_in_list:
            raise _strange(place, f"trial {place_in_list} has the number {shown(trial.number)}")
        told = trial.user_attrs
        for key, kind in _ATTRIBUTES.items():
            if key in told and type(told[key]) is not kind:
                raise _strange(place, f"{key} of trial {trial.number} is {shown(told[key])}")
        if trial.state == TrialState.COMPLETE and not math.isfinite(trial.value or math.nan):
            raise _strange(place, f"the result of trial {trial.number} is {shown(trial.values)}")


_ATTRIBUTES = {"machine": str, "process": int, "repeats": int, "lost": int, "error": str}
"""Attributes of a trial, and their types."""


def _strange(place: str, found: str) -> StudyError:
    return StudyError(
        f"the study in {place} cannot be read ({found}): the database is damaged, or not one that "
        "gpt2fast.tune has made; name another --storage or --out"
    )


def require_same(kept: dict[str, Any], asked: dict[str, Any], where: str) -> None:
    """Raise ConfigError if a study that was begun as `kept` is asked to go on as `asked`."""
    for part, now in asked.items():
        before = kept.get(part)
        if before is None or before == now:
            continue
        if not isinstance(before, dict):
            raise ConfigError(f"{where} was begun with another {part}: {shown(before)}")
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        first = names[0]
        more = f" (and {', '.join(names[1:])})" if names[1:] else ""
        raise ConfigError(
            f"{where} was begun with another {part}: {first} was {shown(before.get(first))} and is "
            f"{shown(now.get(first))} now{more}. Give back the old value, or begin a new study "
            "with another --out (and --study-name, where the storage is shared)"
        )


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks, at most 300 characters."""
    text = " ".join(str(getattr(error, "orig", None) or error).split())
    text = text or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"


@contextmanager
def storage_failures_explained() -> Iterator[None]:
    """Turn the database's exceptions into messages of one line."""
    import optuna
    from sqlalchemy import exc

    try:
        yield
    except (exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise StudyError(
            f"the study's storage failed: {one_line(error.__cause__ or error)}. Give the same "
            "command again when it is back"
        ) from error


# -- trials that nobody runs any more ---------------------------------------------------------


def sign(trial: Trial) -> None:
    """Record in `trial` the process that runs it."""
    trial.set_user_attr("machine", _machine())
    trial.set_user_attr("process", os.getpid())


def counted(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """The finished trials, without those that ran again."""
    again = {trial.user_attrs.get("repeats") for trial in trials}
    return [t for t in trials if t.state.is_finished() and t.number not in again]


def run_again(study: Study, trial: FrozenTrial, *, lost: bool) -> None:
    """Queue another trial with the settings of `trial`, which has ended without a result."""
    times = trial.user_attrs.get("lost", 0) + lost
    if times < _MOST_LOST:
        study.enqueue_trial(trial.params, user_attrs={"repeats": trial.number, "lost": times})


def recover_lost_trials(study: Study) -> None:
    """End the trials whose process on this machine has died, and queue them again at once.

    Optuna's heartbeat does the same for other machines, after `GRACE_SECONDS`.
    """
    import optuna

    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        if _is_lost(trial):
            with suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
                run_again(study, trial, lost=True)


def _after_loss(study: Study, trial: FrozenTrial) -> None:
    run_again(study, trial, lost=True)


def _is_lost(trial: FrozenTrial) -> bool:
    machine, process = trial.user_attrs.get("machine"), trial.user_attrs.get("process")
    if machine is None or process is None:  # killed before it could sign
        begun = trial.datetime_start
        return begun is not None and (datetime.now() - begun).total_seconds() > GRACE_SECONDS
    if machine != _machine() or os.name != "posix":
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _machine() -> str:
    """This machine since its last start; a container counts as one of its own."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
