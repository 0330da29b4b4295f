"""The reports of a run, on the terminal and in its logs; only the main process makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...model import GPT2
from ...tokenizer import Tokenizer
from ..config import TrainConfig
from ..machine import flops, memory
from ..machine.contention import Contention
from ..machine.precision import autocast_dtype
from .log import Logs, check_logs, open_logs
from .progress import Display, open_display
from .samples import prompt_for, sample_text


class Reporter:
    """One run's display and logs.

    Args:
        config: of the run.
        tokenizer: of the data, if known; samples of text need it.
        steps: length of the run.
        silent: show and write nothing.

    Raises:
        ConfigError: something that is asked for needs a package or a tokenizer that is not there.
    """

    def __init__(
        self, config: TrainConfig, tokenizer: Tokenizer | None, steps: int, silent: bool
    ) -> None:
        self.config, self.tokenizer, self.steps, self.silent = config, tokenizer, steps, silent
        check_logs(config)
        self.peak_source: str | None = None
        """The peak that MFU is a share of, for people."""
        self._prompt = ""
        if config.sample_interval is not None:
            self._prompt = prompt_for(tokenizer, config.sample_prompt)
        self._display: Display | None = None
        self._logs: Logs | None = None
        self._peak: flops.Peak | None = None
        self._devices = 1
        self._contention: Contention | None = None

    def open(
        self, model: GPT2, device: torch.device, processes: int, resume_step: int | None,
        elapsed: float,
    ) -> None:  # fmt: skip
        """Open display and logs, once the run is sure to start."""
        if self.silent:
            return
        config = self.config
        peak = flops.peak(device, autocast_dtype(config.dtype))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # Processes of one machine share what its CPU was measured at.
        devices = processes if device.type == "cuda" else 1
        self._logs = open_logs(
            config,
            Path(config.out),
            resume_step,
            flops.flops_per_token(model.config, config.block_size, trained),
            None if peak is None else peak.flops * devices,
        )
        self._display = open_display(self.steps, resume_step or 0, elapsed, config.max_hours)
        self.peak_source = None if peak is None else peak.source
        self._peak, self._devices = peak, devices
        self._contention = Contention() if device.type == "cpu" else None

    def close(self) -> None:
        if self._display is not None:
            self._display.close()
        if self._logs is not None:
            self._logs.close()

    def message(self, text: str) -> None:
        """A line that stays."""
        if self._display is not None:
            self._display.message(text)

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """An optimizer step is done."""
        if self._display is not None:
            self._display.step(step, loss, tokens_per_second)

    def row(self, row: dict[str, Any], device: torch.device) -> None:
        """Log and show a row; see `columns.COLUMNS`."""
        if self._logs is None or self._display is None:
            return
        if self._logs.is_above_peak(row):
            self._replace_peak(device)
        row = self._logs.row({**row, "memory_gib": memory.peak(device) / 2**30})
        self._display.row(row)
        if self._contention is not None and (warning := self._contention.warning()):
            self.message(warning)

    def _replace_peak(self, device: torch.device) -> None:
        """Measure the peak again, which other work on the machine had slowed down."""
        assert self._logs is not None
        again = flops.peak(device, autocast_dtype(self.config.dtype))
        if device.type == "cpu" and again is not None and self._peak is not None:
            self._peak = max(self._peak, again, key=lambda peak: peak.flops)
            self._logs.hold_against(self._peak.flops * self._devices)
            self.message(f"MFU is a share of {self._peak.source} from here on")

    def histograms(self, step: int, model: torch.nn.Module) -> None:
        """Show how weights and gradients are distributed, if that is wanted."""
        if self._logs is not None and self.config.log_histograms:
            self._logs.histograms(step, model)

    def sample(self, step: int, model: GPT2) -> None:
        """Sample a text from the model, log and show it."""
        if self._logs is None or self.tokenizer is None:
            return
        text = sample_text(
            model, self.tokenizer, self._prompt, self.config.sample_tokens, self.config.seed + step
        )
        self._logs.text(step, self._prompt, text)
        self.message(f"sample at step {step}: {self._prompt}{text}")
