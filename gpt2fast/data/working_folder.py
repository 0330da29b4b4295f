"""The folder of a preparation while it is unfinished: taken by one process, continued, published.

Everything is made in `<out>/.unfinished` and moved into place at the end, `meta.json` last; what a
killed run left there lets the next one go on where it stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._system.files import atomic_write_text, sync_directory
from .._system.lock import only_process
from .._system.parsing import read_json
from ..errors import DataError, Error
from ..tokenizer.loading import FILE_NAMES
from ..tokenizer.saving import TOKENIZER_JSON, VOCAB_JSON
from .meta import BIN_FILES, LARGEST, META, read_meta

UNFINISHED = ".unfinished"
START_OVER = "start over with --overwrite (overwrite=True)"
_LOCK = "lock"
RUN = "run.json"


class OtherRunError(DataError):
    """The interrupted run in this folder is another one than is asked for now."""


@contextlib.contextmanager
def working_folder(out_dir: Path, overwrite: bool) -> Iterator[Path]:
    """`out_dir/.unfinished`; it stays after an interruption, and goes after a mistake."""
    if out_dir.exists() and not out_dir.is_dir():
        raise DataError(f"{out_dir} is a file; name a directory for the output")
    work = out_dir / UNFINISHED
    made = [path for path in (out_dir, *out_dir.parents) if not path.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out_dir} cannot be made: {error.strerror}") from None
    busy = DataError(
        f"another process is preparing data in {out_dir}; wait for it, or choose another directory"
    )
    with only_process(work / _LOCK, busy):
        if overwrite:
            _clear(work)
        run = work / RUN
        interrupted = run.exists()
        try:
            if not overwrite and not interrupted:
                _check_vacant(out_dir)
            yield work
        except BaseException as error:
            if not run.exists() or (isinstance(error, Error) and not interrupted):
                with contextlib.suppress(OSError):
                    _remove(work)
                with contextlib.suppress(OSError):
                    for path in made:
                        path.rmdir()
            raise


def _check_vacant(out_dir: Path) -> None:
    for name in (META, *BIN_FILES, TOKENIZER_JSON, VOCAB_JSON):
        if (out_dir / name).exists():
            raise DataError(
                f"{out_dir} already holds {name}; choose another directory, or replace it "
                "with --overwrite (overwrite=True)"
            )


def _clear(work: Path) -> None:
    # First of all: without it nothing that a kill leaves here is continued.
    (work / RUN).unlink(missing_ok=True)
    for item in work.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name != _LOCK:
            item.unlink()


def _remove(work: Path) -> None:
    _clear(work)
    shutil.rmtree(work)


def begun_before(work: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The run begun in the folder, if it is what is `asked` for; without one, clear the folder.

    Raises:
        OtherRunError: another one was begun ("names" of sources or "settings" differ).
    """
    begun: dict[str, Any] | None = None
    with contextlib.suppress(DataError):  # there is none, or a crash damaged it
        begun = read_json(work / RUN, DataError, **LARGEST)
    if begun is None or not {"names", "settings", "signatures"} <= begun.keys():
        _clear(work)
        return None
    found = f"{work.parent} holds an interrupted run"
    if begun["names"] != asked["names"]:
        raise OtherRunError(f"{found} on other files; repeat it to continue, or {START_OVER}")
    before, settings = begun["settings"], asked["settings"]
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        told = ", ".join(f"{n} {before.get(n)!r}, now {settings[n]!r}" for n in changed)
        raise OtherRunError(
            f"{found} with other settings ({told}); repeat it to continue, or {START_OVER}"
        )
    return begun


def publish(work: Path, out_dir: Path) -> None:
    """Move what was prepared into place, meta.json last; the files that it replaces go first."""
    meta = read_meta(work / META)
    replaced = work / "replaced.json"
    made = [
        (path, name)
        for name in meta.files
        for path in (work / name, work / "tokenizer" / name)
        if path.exists() and name != META
    ]
    if not made and (out_dir / META).exists():  # stopped after the last line but one
        _remove(work)
        return
    if (out_dir / META).exists():
        os.replace(out_dir / META, replaced)
    if replaced.exists():
        for name in _files_of(replaced):
            (out_dir / name).unlink(missing_ok=True)
        replaced.unlink()
    for path, name in made:
        os.replace(path, out_dir / name)
    sync_directory(out_dir)
    atomic_write_text(out_dir / META, meta.to_json())
    _remove(work)


def _files_of(meta: Path) -> list[str]:
    try:
        names = read_meta(meta).files
    except DataError:
        return []
    # A file that was not made here stays, whatever the other one says.
    return [name for name in names if name in (*BIN_FILES, *FILE_NAMES)]
