"""The end of a run: its steps are done, its time is up, its loss is low enough or no longer falls,
or a signal asks for it."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from .checkpoints.position import Position
from .config import TrainConfig

_SAME_SIGNAL = 1.0
"""Seconds in which a second signal counts as the first."""
# Ctrl-C; kill and service managers; a terminal that was closed; SLURM's --signal and the like; a
# limit of processor time. Windows has the first two.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOPPING = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Signals that save a checkpoint and end the run."""


class Interrupted(Exception):
    """A run stopped on a signal after saving a checkpoint.

    Args:
        signum: number of the signal.
        message: the checkpoint, and the command that resumes the run.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class SignalWatch:
    """Context manager; `.received` is the signal that came, or None.

    The first signal only sets `.received`. One within a second counts as the same (torchrun passes
    on a Ctrl-C that the terminal has sent to all); a later one acts at once, as it would without
    this.
    A SIGHUP that is ignored, as under nohup, stays ignored. Outside the main thread, where Python
    allows no handlers, it watches nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():
            for signum in STOPPING:
                ignored = signal.getsignal(signum) == signal.SIG_IGN
                if not ignored or signum in (signal.SIGINT, signal.SIGTERM):
                    self._previous[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._restore()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signum, now
        elif now - self._received_at > _SAME_SIGNAL:
            self._restore()
            signal.raise_signal(signum)

    def _restore(self) -> None:
        while self._previous:
            signum, handler = self._previous.popitem()
            signal.signal(signum, handler)


def out_of_time(config: TrainConfig, position: Position, steps: int, elapsed: float) -> str | None:
    """The reason to end at the last of `steps` or after `elapsed` seconds; None to go on."""
    if position.step >= steps:
        return "done"
    if position.step and config.max_hours is not None and elapsed >= config.max_hours * 3600:
        return f"stopped after {config.max_hours:g} hours (--max-hours)"
    return None


def good_enough(config: TrainConfig, position: Position) -> str | None:
    """The reason to end after the validation of this step; None to go on."""
    if not position.step or position.evaluated != position.step:
        return None
    if config.target_loss is not None and position.val_loss <= config.target_loss:
        return f"stopped at a validation loss of {position.val_loss:.4f} (--target-loss)"
    if config.early_stopping is not None and position.without_best >= config.early_stopping:
        return (
            f"stopped after {position.without_best} validations without a new lowest loss "
            "(--early-stopping)"
        )
    return None
