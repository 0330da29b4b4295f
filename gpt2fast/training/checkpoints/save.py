"""Checkpoints: a loadable model folder and what it takes to continue the run bit for bit.

    checkpoints/step-00001000/    config.json, model.safetensors, tokenizer files,
                                  training_state.safetensors (settings, random states, position),
                                  optimizer/ (torch.distributed.checkpoint's, each process's part)
    checkpoints/best/             likewise, the one with the lowest validation loss

A folder is written beside its place and renamed into it, and renamed before it is deleted, so a
name in checkpoints/ is always a whole checkpoint. Any number of processes can read what any other
number has written.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._system.files import sync_directory
from ..._system.pickle_check import Objection
from ...errors import ConfigError, Error, WeightsError, shown
from . import state as state_file
from .shards import load_tensors, save_tensors

if TYPE_CHECKING:
    from ...model import GPT2
    from ...tokenizer import Tokenizer
    from ..distributed import Group

OPTIMIZER = "optimizer"
BEST = "best"
_FORMAT = 2
_STEP_NAME = re.compile(r"step-(\d{8,})")


def save_checkpoint(
    directory: Path,
    save_whole: Callable[[Path], None],
    state: dict[str, Any],
    optimizer: dict[str, Tensor],
    group: Group,
) -> None:
    """Write a whole checkpoint as `directory`, replacing one of that name.

    Args:
        directory: its place.
        save_whole: writes what can be used without the run, into the folder it is given.
        state: plain values; the main process's count.
        optimizer: each process's part of the optimizer's state; shards as DTensors.
        group: the processes of the run, all of which call this.
    """
    temporary = directory.with_name(f".{directory.name}.new")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_whole(temporary)
        state_file.write_state(temporary / state_file.NAME, {"format": _FORMAT, **state})

    try:
        group.on_main(begin)
        save_tensors(optimizer, temporary / OPTIMIZER, group)
        group.on_main(lambda: _put_in_place(temporary, directory))
    except BaseException:
        if group.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put_in_place(temporary: Path, directory: Path) -> None:
    aside = _aside(directory)
    for path in temporary.rglob("*"):
        if path.is_file():
            _fsync(path)
    sync_directory(temporary / OPTIMIZER)
    sync_directory(temporary)
    if directory.exists():
        shutil.rmtree(aside, ignore_errors=True)
        directory.rename(aside)
    temporary.rename(directory)
    sync_directory(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(directory: Path) -> Path:
    """Where a checkpoint is while another one takes its place."""
    return directory.with_name(f".{directory.name}.old")


def save_model(model: GPT2, directory: Path, tokenizer: Tokenizer | None) -> None:
    """`model.save_pretrained`, with an OSError where the disk does not take it."""
    try:
        model.save_pretrained(directory, tokenizer=tokenizer)
    except WeightsError as error:
        raise OSError(str(error)) from error


def load_state(directory: Path) -> dict[str, Any]:
    """The state in a checkpoint folder, but the optimizer's. Runs no code from the file."""
    path = state_file.state_file(directory)
    if path is None:
        raise ConfigError(
            f"{directory} is not a checkpoint of a training run: {state_file.NAME} is missing; to "
            f"start a new run from these weights, use --init-from {directory}"
        )
    try:
        state = state_file.read_state(path)
    except Exception as error:  # a damaged pickle or archive fails in any way it likes
        reason = f": it {error}" if isinstance(error, Objection) else ""
        raise WeightsError(
            f"{path} cannot be read{reason}. It is damaged, cut short or not a training state; "
            "name an older checkpoint: --resume PATH"
        ) from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ConfigError(f"{path} has format {shown(found)}; this version reads format {_FORMAT}")
    if "adapters" not in state:
        raise explain_state(path, KeyError("adapters"))
    return state


def load_optimizer(directory: Path, optimizer: dict[str, Tensor], group: Group) -> None:
    """Read this process's part of the optimizer's state into the tensors that hold it."""
    load_tensors(optimizer, directory / OPTIMIZER, group)


def step_directory(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps."""
    return checkpoints / f"step-{step:08d}"


def step_checkpoints(checkpoints: Path, after: int = -1) -> list[Path]:
    """Checkpoint folders named by step, oldest first; those of later steps than `after`."""
    if not checkpoints.is_dir():
        return []
    numbered = [
        (int(match[1]), path)
        for path in checkpoints.iterdir()
        if (match := _STEP_NAME.fullmatch(path.name)) and int(match[1]) > after
    ]
    return [path for _, path in sorted(numbered)]


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The whole checkpoint with the highest step; the best one counts where there is no other."""
    found = [path for path in step_checkpoints(checkpoints) if state_file.state_file(path)]
    if found:
        return found[-1]
    best = checkpoints / BEST
    # A run that was killed while it replaced the best one: `clean_up` brings it back.
    there = any(state_file.state_file(path) for path in (best, _aside(best)))
    return best if there else None


def best_step(checkpoints: Path) -> int | None:
    """Step of the checkpoint with the best validation loss; None if there is none to read."""
    try:
        return load_state(checkpoints / BEST)["position"]["step"]
    except (Error, KeyError, TypeError):
        return None


def explain_state(path: Path, error: Exception) -> WeightsError:
    """What to say where a state lacks something, or has something else in its place."""
    reason = f"{type(error).__name__}: {shown(str(error))}"
    return WeightsError(
        f"{path} is damaged or was not written by this program ({reason}); name an older "
        "checkpoint: --resume PATH"
    )


def set_aside(checkpoints: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, which a resumed run makes anew; their new names."""
    moved = []
    for path in step_checkpoints(checkpoints, after=step):
        aside = path.with_name(f"replaced-{path.name}")
        if aside.exists():
            shutil.rmtree(aside)
        moved.append(path.rename(aside))
    return moved


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by `path`: itself, or the newest one of the run in that folder."""
    if state_file.state_file(path) is not None:
        return path
    for checkpoints in (path / "checkpoints", path):
        if found := newest_checkpoint(checkpoints):
            return found
    if not path.is_dir():
        raise ConfigError(f"cannot resume from {path}: there is no such folder")
    raise ConfigError(f"cannot resume from {path}: no checkpoint in it; start without --resume")


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


def random_states() -> dict[str, Any]:
    """States of every global random generator that a run may draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
