"""The folder of a run: one run at a time, never over another one; and how its failures read."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .._system.files import remove_unfinished
from .._system.lock import only_process
from ..errors import ConfigError, Error, is_out_of_memory
from .checkpoints import save as ckpt
from .config import TrainConfig

_FILES = (
    *("config.yaml", "log.csv", "log.jsonl", "samples.jsonl"),
    *("config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
)


class TrainingError(Error):
    """The run cannot go on: the loss is no longer finite, the disk or the memory is full, …"""


@contextmanager
def lock_run_folder(out: Path) -> Iterator[None]:
    """Make the run folder and keep a second run out of it; an empty one goes when it fails."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out is {str(out)!r}, which is a file; name a folder with --out")
    made = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    busy = ConfigError(
        f"another process is training in {out}; wait for it, or name another folder with --out"
    )
    try:
        with only_process(out / ".lock", busy):
            remove_unfinished(out, _FILES)
            yield
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def require_no_run(out: Path) -> None:
    """Raise ConfigError if `out` holds a run that a new one would overwrite."""
    newest = ckpt.newest_checkpoint(out / "checkpoints")
    if newest or (out / "model.safetensors").exists():
        found = newest or out / "model.safetensors"
        raise ConfigError(
            f"out is {str(out)!r}, which already holds a run ({found}): continue it with "
            f"--resume {shlex.quote(str(out))}, name another --out, or delete the folder"
        )


def resume_hint(out: Path) -> str:
    """What a failed run leaves to go on from, as part of a sentence."""
    newest = ckpt.newest_checkpoint(out / "checkpoints")
    if newest is None:
        return "no checkpoint was made"
    return f"the last checkpoint stands: {newest} (--resume {shlex.quote(str(out))})"


@contextmanager
def failures_explained(config: TrainConfig) -> Iterator[None]:
    """Turn what the disk and the memory raise into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        reason = f"{where}{error.strerror or error}"
        raise TrainingError(
            f"cannot train in {config.out}: {reason}; {resume_hint(Path(config.out))}. Make room, "
            "or name another folder with --out"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory; {resume_hint(Path(config.out))}. {how_to_save_memory(config)}"
        ) from error


def how_to_save_memory(config: TrainConfig) -> str:
    """What to change when a run does not fit."""
    spared = "" if config.checkpoint_activations else "add --checkpoint-activations, "
    return (
        f"Lower --batch-size (now {config.batch_size}; --grad-accumulation keeps the tokens of a "
        f"step), --block-size (now {config.block_size}), {spared}or train a smaller model"
    )
