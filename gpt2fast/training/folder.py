"""The folder of a run: one run at a time, never over another one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .._system.files import atomic_write_text, remove_unfinished
from .._system.lock import only_process
from ..checkpoints.run_folder import CHECKPOINTS, JSON_LOG, LOG, MODEL, SAMPLES, SETTINGS
from ..errors import ConfigError
from .checkpoints.folder import newest_checkpoint
from .config import TrainConfig
from .start.data import located

_FILES = (
    *(SETTINGS, LOG, JSON_LOG, SAMPLES, "config.json", "generation_config.json", MODEL),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
)


@contextmanager
def lock_run_folder(out: Path) -> Iterator[None]:
    """Make the run folder and keep a second run out; a failure removes an empty one."""
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
    newest = newest_checkpoint(out / CHECKPOINTS)
    if newest or (out / MODEL).exists():
        found = newest or out / MODEL
        raise ConfigError(
            f"out is {str(out)!r}, which already holds a run ({found}): continue it with "
            f"--resume {shlex.quote(str(out))}, name another --out, or delete the folder"
        )


def resume_hint(out: Path) -> str:
    """The last checkpoint of a failed run and how to resume from it, as part of a sentence."""
    newest = newest_checkpoint(out / CHECKPOINTS)
    if newest is None:
        return "no checkpoint was made"
    return f"the last checkpoint stands: {newest} (--resume {shlex.quote(str(out))})"


def write_settings(config: TrainConfig) -> None:
    """Write config.yaml, whose paths a resumed run finds from any folder."""
    import yaml

    values = {**config.to_dict(), **located(config)}
    atomic_write_text(Path(config.out) / SETTINGS, yaml.safe_dump(values, sort_keys=False))
