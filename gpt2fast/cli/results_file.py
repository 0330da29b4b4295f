"""--out: a file of results that grows a line at a time, and goes on after whatever interrupted it.

Beside it stands NAME.job.json, which says whose results they are: digests of the prompts and of the
model, and the options. Results are appended in the order of the prompts, and are on the disk after
a second at the latest; what a kill or a loss of power has torn at the end is cut off and made
again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._system.files import atomic_write_text
from .._system.lock import only_process
from .._system.parsing import Unreadable, parse_json, read_json
from ..errors import GenerationError, reason_of, shown

if TYPE_CHECKING:
    from ..inference.generator import Generator

_SYNC_SECONDS = 1.0
"""Results wait this long for the disk, at most."""
_SAMPLED = 1021
"""One byte, or number, of so many of the weights goes into their digest."""
_DIGESTS = ("weights", "vocabulary")
_MOST_VALUES = 1 << 30
"""A result may name a vocabulary of alternatives for each of its tokens."""


class ResultsFile:
    """Results that are written, and those that were there.

    Args:
        path: of the file.
        done: groups that it holds: of a prompt, all results or one error.
        failed: how many of them are errors.
    """

    def __init__(self, path: Path, done: int, failed: int):
        self.path, self.done, self.failed = path, done, failed
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._synced = time.monotonic()

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append the results of a prompt, or its error.

        Raises:
            GenerationError: they cannot be written, because the disk is full, say.
        """
        left = memoryview(b"".join(map(_encoded, lines)))
        with self._reported():
            while left:
                left = left[self._file.write(left) :]
            if time.monotonic() - self._synced >= _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        self.done += 1
        self.failed += "error" in lines[0]

    def sync(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            GenerationError: it does not get there.
        """
        with self._reported():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file, whatever happened to it."""
        self._file.close()

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise GenerationError(
                f"--out {self.path}: {reason_of(error)}; {self.done} prompts are done: make room, "
                "and give the same command again, which goes on from there"
            ) from None


def check_out(out: str, prompts_file: str) -> None:
    """Refuse a place where no results can be appended, before anything is loaded.

    Args:
        out: the name of the file.
        prompts_file: the name of that with the prompts.
    """
    path = Path(out)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise GenerationError(
                f"--out {out}: there is no folder {path.parent}; make it, or name another"
            ) from None
        return
    except OSError as error:
        raise GenerationError(f"--out {out}: {reason_of(error)}") from None
    if not stat.S_ISREG(mode):
        raise GenerationError(
            f"--out {out} is no file, and results are appended to one that can be read again: name "
            "a file, or leave --out away for standard output"
        )
    if prompts_file != "-" and os.path.exists(prompts_file) and path.samefile(prompts_file):
        raise GenerationError(f"--out {out}: that is the file of the prompts; name another one")


@contextmanager
def results_file(
    out: str, job: Mapping[str, Any], indices: Sequence[int], copies: int
) -> Iterator[ResultsFile]:
    """The file to append to, whose last line is whole; nobody else appends meanwhile.

    Args:
        out: its name.
        job: what the results are of, as `job_of` gives it.
        indices: the number of each prompt's line, from 0.
        copies: results of a prompt.

    Raises:
        GenerationError: the file is not one of this job, or cannot be written.
    """
    path = Path(out)
    about = path.with_name(f"{path.name}.job.json")
    busy = GenerationError(f"--out {out}: another process is writing there")
    try:
        with only_process(path.with_name(f".{path.name}.lock"), busy):
            if path.exists() and path.stat().st_size:
                _check_job(path, about, job)
            else:
                atomic_write_text(about, json.dumps(job, indent=1, sort_keys=True) + "\n")
            done, failed, size = _read(path, indices, copies)
            if path.exists() and path.stat().st_size > size:
                os.truncate(path, size)
            file = ResultsFile(path, done, failed)
            try:
                yield file
                file.sync()
            finally:
                file.close()
    except OSError as error:
        raise GenerationError(f"--out {out}: {reason_of(error)}") from None


def job_of(
    generator: Generator, prompts: bytes, options: Mapping[str, Any], model: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides the results of a job, in plain values.

    Args:
        generator: which writes them.
        prompts: the content of their file.
        options: of all prompts.
        model: how the model was named, and what was done to it.
    """
    return {
        "prompts": hashlib.sha256(prompts).hexdigest(),
        "model": {
            **{name: value for name, value in model.items() if value is not None},
            "weights": _digest(generator),
            "vocabulary": generator.tokenizer.fingerprint(),
        },
        "options": json.loads(json.dumps(dict(options), default=str)),
    }


def _digest(generator: Generator) -> str:
    """SHA-256 (hex) over a sample of the weights: another training has other ones everywhere."""
    from ..inference.packed import PackedGPT2

    model = generator.model
    tensors = [model.weights.arena] if isinstance(model, PackedGPT2) else list(model.parameters())
    found = hashlib.sha256()
    for tensor in tensors:
        sample = tensor.detach().flatten()[::_SAMPLED]
        wide = sample if not sample.is_floating_point() else sample.float()
        found.update(wide.cpu().numpy().tobytes())
    return found.hexdigest()


def _check_job(path: Path, about: Path, job: Mapping[str, Any]) -> None:
    """Refuse to append to results of another job."""
    way_out = f"name another file, or remove {path.name} and {about.name} to begin anew"
    if not about.exists():
        raise GenerationError(
            f"--out {path} exists, and no {about.name} beside it says that it is of this job: "
            "name another file, or remove it"
        )
    before = read_json(about, GenerationError)
    for name in ("prompts", "model", "options"):
        if before.get(name) == job[name]:
            continue
        what = f"other {name}" if name != "model" else "another model"
        if isinstance(before.get(name), dict):
            old, new = before[name], job[name]
            changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            changed = [key for key in changed if key not in _DIGESTS]
            if changed:
                key = changed[0]
                pair = f"{shown(old.get(key))}, and now {shown(new.get(key))}"
                what += f" ({key} was {pair})"
        raise GenerationError(f"--out {path} holds results of {what}: {way_out}")


def _read(path: Path, indices: Sequence[int], copies: int) -> tuple[int, int, int]:
    """Whole groups in the file, how many of them are errors, and the bytes that they take."""
    done = failed = size = place = samples = 0
    torn = False
    if not path.exists():
        return done, failed, size
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            place += len(line)
            value = _result(line)
            if value is None:
                torn = True  # and whatever follows must be torn as well
                continue
            belongs = done < len(indices) and value.get("index") == indices[done]
            if torn or not belongs or ("error" not in value and value.get("sample") != samples):
                raise GenerationError(
                    f"--out {path}, line {number}, is not the result that belongs there: the file "
                    "was changed; name another one, or remove it"
                )
            samples += 1
            if samples == copies or "error" in value:
                done, failed = done + 1, failed + ("error" in value)
                size, samples = place, 0
    return done, failed, size


def _encoded(line: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(line, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a lone surrogate, which an "id" may hold
        return (json.dumps(line) + "\n").encode()


def _result(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None if it is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = parse_json(line.decode(), most_values=_MOST_VALUES)
    except (UnicodeDecodeError, Unreadable):
        return None
    return value if isinstance(value, dict) else None
