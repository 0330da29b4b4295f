"""The log as TensorBoard shows it; the horizontal axis is the step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import nn

from ..config import TrainConfig
from .columns import SCALARS
from .histogram import parameter_histograms


class TensorBoardLog:
    """Event files in a folder.

    A resumed run goes on in a new file, which tells TensorBoard to forget the steps of the old one
    that come after `resume_step`.
    """

    def __init__(self, folder: Path, config: TrainConfig, resume_step: int | None) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        if resume_step is None:
            for path in _event_files(folder):
                path.unlink()
        _pass_second(folder)
        # A new run gives a start, too: TensorBoard takes the first that it sees for a restart.
        start = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=start)
        settings = [f"{name}: {value}" for name, value in config.to_dict().items()]
        self._writer.add_text("settings", _verbatim("\n".join(settings)), resume_step or 0)
        self._writer.flush()

    def row(self, row: dict[str, Any]) -> None:
        for name, tag in SCALARS.items():
            if row.get(name) is not None:
                self._writer.add_scalar(tag, row[name], row["step"])
        self._writer.flush()

    def text(self, step: int, prompt: str, text: str) -> None:
        self._writer.add_text("sample", _verbatim(prompt + text), step)
        self._writer.flush()

    def histograms(self, step: int, model: nn.Module) -> None:
        for tag, found in parameter_histograms(model):
            self._writer.add_histogram_raw(
                tag,
                min=found.low,
                max=found.high,
                num=sum(found.counts),
                sum=found.total,
                sum_squares=found.squares,
                bucket_limits=found.edges[1:],
                bucket_counts=found.counts,
                global_step=step,
            )
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _event_files(folder: Path) -> list[Path]:
    return list(folder.glob("events.out.tfevents.*"))


def _pass_second(folder: Path) -> None:
    """Wait for a new second: TensorBoard orders files by the second in their names."""
    for _ in range(20):
        name = f"events.out.tfevents.{int(time.time()):010d}."
        if not any(path.name.startswith(name) for path in _event_files(folder)):
            return
        time.sleep(0.1)


def _verbatim(text: str) -> str:
    """Markdown that shows `text` verbatim."""
    return "".join(f"    {line}\n" for line in text.split("\n"))
