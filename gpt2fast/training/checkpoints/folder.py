"""The checkpoints in a run's folder: their names, the newest, remains of a killed run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ...checkpoints.run_folder import BEST, CHECKPOINTS, STEP
from ...errors import ConfigError, Error
from .state import load_state, state_file

_STEP_NAME = re.compile(rf"{STEP}(\d{{8,}})")


def step_directory(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return checkpoints / f"{STEP}{step:08d}"


def step_checkpoints(checkpoints: Path, after: int = -1) -> list[Path]:
    """Folders of step checkpoints after step `after`, oldest first."""
    if not checkpoints.is_dir():
        return []
    numbered = [
        (int(match[1]), path)
        for path in checkpoints.iterdir()
        if (match := _STEP_NAME.fullmatch(path.name)) and int(match[1]) > after
    ]
    return [path for _, path in sorted(numbered)]


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The complete checkpoint with the highest step; the best one where there is no other."""
    found = [path for path in step_checkpoints(checkpoints) if state_file(path)]
    if found:
        return found[-1]
    best = checkpoints / BEST
    # A run that was killed while it replaced the best one: `clean_up` brings it back.
    there = any(state_file(path) for path in (best, displaced(best)))
    return best if there else None


def best_step(checkpoints: Path) -> int | None:
    """Step of the checkpoint with the best validation loss; None if there is none to read."""
    try:
        return load_state(checkpoints / BEST)["position"]["step"]
    except (Error, KeyError, TypeError):
        return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest one of the run in that folder."""
    if state_file(path) is not None:
        return path
    for checkpoints in (path / CHECKPOINTS, path):
        if found := newest_checkpoint(checkpoints):
            return found
    if not path.is_dir():
        raise ConfigError(f"cannot resume from {path}: there is no such folder")
    raise ConfigError(f"cannot resume from {path}: no checkpoint in it; start without --resume")


def set_aside(checkpoints: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, which a resumed run makes anew; their new names."""
    moved = []
    for path in step_checkpoints(checkpoints, after=step):
        aside = path.with_name(f"replaced-{path.name}")
        if aside.exists():
            shutil.rmtree(aside)
        moved.append(path.rename(aside))
    return moved


def drop_old(checkpoints: Path, keep: int) -> None:
    """Delete step checkpoints except the newest `keep`."""
    for path in step_checkpoints(checkpoints)[:-keep]:
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.gone")))


def clean_up(checkpoints: Path) -> None:
    """Clear what a killed run left half done: unfinished folders go, a displaced one returns."""
    if not checkpoints.is_dir():
        return
    for aside in checkpoints.glob(".*.old"):
        place = aside.with_name(aside.name[1 : -len(".old")])
        if place.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(place)
    for pattern in (".*.new", ".*.gone"):
        for unfinished in checkpoints.glob(pattern):
            shutil.rmtree(unfinished)


def displaced(directory: Path) -> Path:
    """The folder that holds a checkpoint while a new one takes its place."""
    return directory.with_name(f".{directory.name}.old")
