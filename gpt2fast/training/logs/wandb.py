"""The log as Weights & Biases shows it."""

from __future__ import annotations

import html
import secrets
from pathlib import Path
from typing import Any

from torch import nn

from ..._system.files import atomic_write_text
from ...checkpoints.run_folder import WANDB_ID
from ...errors import ConfigError
from ..config import TrainConfig
from .columns import SCALARS
from .histogram import parameter_histograms


class WandbLog:
    """A run of the project `config.wandb`, named as the folder `out`.

    Rows that a resumed run makes again are the same ones, and the service keeps the first.
    """

    def __init__(self, out: Path, config: TrainConfig, resume_step: int | None) -> None:
        import wandb

        self._wandb = wandb
        path = out / WANDB_ID
        known = path.read_text().strip() if resume_step is not None and path.is_file() else ""
        identity = known or secrets.token_hex(8)
        if not known:
            atomic_write_text(path, identity + "\n")
        try:
            self._run = wandb.init(
                project=config.wandb,
                id=identity,
                name=out.resolve().name,
                dir=str(out),
                config=config.to_dict(),
                resume="allow",
            )
        except Exception as error:  # it has many kinds, most of them not public
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"wandb is {config.wandb!r}, but Weights & Biases did not start: {reason:.300}; "
                "log in with `wandb login`, set WANDB_MODE=offline, or leave out --wandb"
            ) from error

    def row(self, row: dict[str, Any]) -> None:
        values = {tag: row[name] for name, tag in SCALARS.items() if row.get(name) is not None}
        self._run.log(values, step=row["step"])

    def text(self, step: int, prompt: str, text: str) -> None:
        shown = f"<pre>{html.escape(prompt)}<b>{html.escape(text)}</b></pre>"
        self._run.log({"sample": self._wandb.Html(shown)}, step=step)

    def histograms(self, step: int, model: nn.Module) -> None:
        found = {
            tag: self._wandb.Histogram(np_histogram=(one.counts, one.edges))
            for tag, one in parameter_histograms(model)
        }
        self._run.log(found, step=step)

    def close(self) -> None:
        self._run.finish()
