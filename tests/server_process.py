"""A server of a small model as a process of its own, for tests of what clients see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gpt2fast import GPT2, GPT2Config
from small_bpe import BPE, SIZE
from time_limits import patience

ROOT = Path(__file__).parents[1]
POSITIONS = 128
NAME = "small"


def save_model(folder: Path) -> Path:
    """A GPT-2 of random weights, which writes all of its tokens, halves of characters too."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=SIZE, n_positions=POSITIONS,
        initializer_range=0.3, bos_token_id=SIZE - 1, eos_token_id=SIZE - 1,
    )  # fmt: skip
    place = folder / NAME
    GPT2(config).save_pretrained(place, BPE)
    return place


class Server:
    """A running `gpt2fast serve`.

    Args:
        process: it.
        url: where it listens.
        log: file of its standard error.
    """

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path) -> None:
        self.process, self.url, self._log = process, url, log
        self.port = int(url.rpartition(":")[2])

    def log(self, event: str | None = None) -> list[dict[str, Any]]:
        """The lines of its log, or those of one event."""
        lines = self._log.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [entry for entry in found if event in (None, entry["event"])]

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(patience())


@contextmanager
def serving(model: Path, folder: Path, *flags: str, **environment: str) -> Iterator[Server]:
    """A server of a model, which ends with the block.

    Args:
        model: folder of the model.
        folder: for its log.
        flags: more arguments.
        environment: more variables.
    """
    log = folder / "server.log"
    command = [sys.executable, "-m", "gpt2fast.serve", "--model", str(model), "--port", "0"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, *flags], env=variables, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        yield Server(process, _address(process, log), log)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        text = log.read_text(encoding="utf-8")
        assert "Traceback" not in text, text


def _address(process: subprocess.Popen[str], log: Path) -> str:
    lines: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        lines.append(process.stdout.readline())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(patience())
    assert lines and lines[0].startswith("serving "), (lines, log.read_text())
    return lines[0].split()[3]
