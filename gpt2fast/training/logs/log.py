"""The logs of a run: log.csv and log.jsonl always, TensorBoard and Weights & Biases on request.

A resumed run keeps the rows up to the step that it resumes from and appends to them.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..._system.files import atomic_write, read_file
from ..._system.parsing import Unreadable, parse_json
from ...checkpoints.run_folder import JSON_LOG, LOG, SAMPLES, TENSORBOARD
from ...errors import ConfigError, DataError
from .columns import COLUMNS, OLD_NAMES

if TYPE_CHECKING:
    from torch import nn

    from ..config import TrainConfig


# A row has some hundred bytes and a dozen values.
_LARGEST_LOG = 128 << 20
_MOST_VALUES = 1000


class Sink(Protocol):
    """A log outside the run's own files."""

    def row(self, row: dict[str, Any]) -> None: ...

    def text(self, step: int, prompt: str, text: str) -> None: ...

    def histograms(self, step: int, model: nn.Module) -> None: ...

    def close(self) -> None: ...


def check_logs(config: TrainConfig) -> None:
    """Raise ConfigError if a log that is asked for needs a package that is not there."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard is true, but the package tensorboard is not installed: "
            'pip install "gpt2fast[logs]", or leave out --tensorboard'
        )
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"wandb is {config.wandb!r}, but the package wandb is not installed: "
            "pip install wandb, or leave out --wandb"
        )


def open_logs(
    config: TrainConfig,
    out: Path,
    resume_step: int | None,
    flops_per_token: float | None = None,
    peak_flops: float | None = None,
) -> Logs:
    """The logs of the run in folder `out`.

    Args:
        resume_step: step that the run goes on from; None starts every log afresh.
        flops_per_token: of a training step, `flops.flops_per_token`.
        peak_flops: FLOP/s of all devices together, `flops.peak`; with both, rows get their
            `mfu`.

    Raises:
        ConfigError: a package is missing, or Weights & Biases refuses to start.
    """
    check_logs(config)
    with ExitStack() as opened:  # what is open already is closed if the next cannot be
        csv_log = RunLog(out / LOG, resume_step)
        opened.callback(csv_log.close)
        json_log = JSONLines(out / JSON_LOG, resume_step, before=csv_log.kept)
        opened.callback(json_log.close)
        sinks: list[Sink] = []
        if config.tensorboard:
            from .tensorboard import TensorBoardLog

            sinks.append(TensorBoardLog(out / TENSORBOARD, config, resume_step))
            opened.callback(sinks[-1].close)
        if config.wandb is not None:
            from .wandb import WandbLog

            sinks.append(WandbLog(out, config, resume_step))
            opened.callback(sinks[-1].close)
        samples = out / SAMPLES
        logs = Logs(csv_log, json_log, sinks, samples, resume_step, flops_per_token)
        logs.hold_against(peak_flops)
        opened.pop_all()
    return logs


class Logs:
    """All the logs of a run; made by `open_logs`."""

    def __init__(
        self,
        csv_log: RunLog,
        json_log: JSONLines,
        sinks: list[Sink],
        samples: Path,
        resume_step: int | None,
        flops_per_token: float | None,
    ) -> None:
        self._csv, self._json, self._sinks = csv_log, json_log, sinks
        self._csv_kept = {row["step"] for row in csv_log.kept}
        self._flops_per_token = flops_per_token
        self._seconds_per_token: float | None = None  # what one would take at the peak
        self._samples_path, self._resume_step = samples, resume_step
        self._samples: JSONLines | None = None
        if samples.exists():
            self._samples = JSONLines(samples, resume_step)

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write a row to disk. Its keys are from `COLUMNS`; absent and None are the same.

        A resumed run does not write the row of its first step again.

        Returns:
            The row as it was written, with its `mfu`, which is left out if it is above 1: the
            peak is wrong then.
        """
        if row.get("mfu") is None and (share := self._share(row)) and share <= 1:
            row = {**row, "mfu": share}
        step = row["step"]
        if step not in self._csv_kept:
            self._csv.write(row)
        if step not in self._json.kept:
            self._json.write({name: row.get(name) for name in COLUMNS})
            for sink in self._sinks:
                sink.row(row)
        return row

    def hold_against(self, peak_flops: float | None) -> None:
        """Compute `mfu` from this peak, FLOP/s, from now on."""
        known = self._flops_per_token and peak_flops
        self._seconds_per_token = self._flops_per_token / peak_flops if known else None  # type: ignore[operator]

    def is_above_peak(self, row: dict[str, Any]) -> bool:
        """True for a row that is faster than the peak, which must be wrong then."""
        return (self._share(row) or 0) > 1

    def _share(self, row: dict[str, Any]) -> float | None:
        speed, seconds = row.get("tokens_per_second"), self._seconds_per_token
        return None if speed is None or seconds is None else speed * seconds

    def text(self, step: int, prompt: str, text: str) -> None:
        """Keep a sample of text, the continuation of `prompt`, in samples.jsonl too.

        A resumed run does not keep the sample of its first step again.
        """
        if self._samples is None:
            self._samples = JSONLines(self._samples_path, self._resume_step)
        if step in self._samples.kept:
            return
        self._samples.write({"step": step, "prompt": prompt, "text": text})
        for sink in self._sinks:
            sink.text(step, prompt, text)

    def histograms(self, step: int, model: nn.Module) -> None:
        """Log the distribution of each weight and of each gradient that there is."""
        for sink in self._sinks:
            sink.histograms(step, model)

    def close(self) -> None:
        """Close every log, whatever happens to one of them."""
        with ExitStack() as stack:
            for log in (self._csv, self._json, self._samples, *self._sinks):
                if log is not None:
                    stack.callback(log.close)


class RunLog:
    """log.csv. Appends rows; each is on disk when `write` returns. Absent values are empty cells.

    `kept` are the rows of the resumed run, as numbers.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Start `path` afresh, or keep its rows up to and including `resume_step`."""
        rows: list[dict[str, Any]] = []
        if resume_step is not None and path.is_file():
            rows = [row for row in _csv_rows(path) if _step(row) <= resume_step]
        with atomic_write(path, "w") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        self.kept = [_numbers(row) for row in rows]
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")

    def write(self, row: dict[str, Any]) -> None:
        self._writer.writerow({name: _cell(row.get(name)) for name in COLUMNS})
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class JSONLines:
    """A file with a JSON object a line, each with its step; numbers that are not finite are null.

    `kept` are the steps of the resumed run's lines.
    """

    def __init__(
        self, path: Path, resume_step: int | None = None, before: Iterable[dict[str, Any]] = ()
    ) -> None:
        """Start `path` afresh, or keep its lines up to and including `resume_step`.

        Args:
            before: lines to start with if there is no such file yet.
        """
        rows: list[dict[str, Any]] = []
        if resume_step is not None:
            found = read_json_lines(path) if path.is_file() else before
            rows = [row for row in found if row["step"] <= resume_step]
        with atomic_write(path, "w") as file:
            file.writelines(map(_json_line, rows))
        self.kept = {row["step"] for row in rows}
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(_json_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.csv as numbers, None where a cell is empty; torn rows are left out."""
    return [_numbers(row) for row in _csv_rows(path) if _step(row) < math.inf]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that have a step; torn lines are left out."""
    rows: list[dict[str, Any]] = []
    for line in _whole_lines(path):
        try:
            row = parse_json(line, most_values=_MOST_VALUES)
        except Unreadable:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and _is_step(row["step"]):
            rows.append({str(OLD_NAMES.get(name, name)): value for name, value in row.items()})
    return rows


def _whole_lines(path: Path) -> list[str]:
    """Lines that are complete: a crash may cut the last one, a power cut leave zeros in others."""
    text = read_file(path, _LARGEST_LOG).decode("utf-8", errors="replace")
    # Not splitlines(), which also splits at characters that a sample of text may hold.
    return [f"{line}\n" for line in text.split("\n")[:-1] if "\0" not in line]


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO("".join(_whole_lines(path)), newline=""))
    try:
        names = list(reader.fieldnames or ())
        if len(names) > _MOST_VALUES:
            raise csv.Error(f"{len(names)} columns, of which {_MOST_VALUES} are read")
        reader.fieldnames = [OLD_NAMES.get(name, name) for name in names]
        return list(reader)
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as a log: {error}") from None


def _step(row: dict[str, Any]) -> float:
    """A row's step; a row that a crash cut short counts as later than every step."""
    step = row.get("step") or ""
    whole = None not in row.values() and re.fullmatch("[0-9]{1,19}", step)
    return int(step) if whole and _is_step(int(step)) else math.inf


def _is_step(number: int) -> bool:
    return 0 <= number < 1 << 63


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {name: _number(row.get(name)) for name in COLUMNS}


def _number(cell: str | None) -> int | float | None:
    if not cell:
        return None
    try:
        return int(cell) if re.fullmatch("[0-9]{1,19}", cell) else float(cell)
    except ValueError:
        return None


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _json_line(row: dict[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, ensure_ascii=False) + "\n"
