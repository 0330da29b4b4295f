"""A directory that `GPT2.save_pretrained` wrote, read with numpy alone: no peer's environment has
more than that in common."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np


class PeerError(Exception):
    """A peer cannot be set up, fed or run; its text says what to do."""


class Checkpoint:
    """GPT-2's float32 weights by name ("h.0.attn.c_attn.weight"), and its shape."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        config = self.directory / "config.json"
        weights = self.directory / "model.safetensors"
        for file in (config, weights):
            if not file.is_file():
                raise PeerError(f"{file} does not exist: name a directory of GPT2.save_pretrained")
        self.config: dict[str, Any] = json.loads(config.read_text())
        if not self.config.get("tie_word_embeddings", True):
            raise PeerError(f"{config}: the converters know tied word embeddings only")
        with open(weights, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            self._header = json.loads(stream.read(size))
        self._data = np.memmap(weights, np.uint8, "r", offset=8 + size)

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        return self.config["n_layer"]

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.config["n_head"]

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.config["n_embd"]

    @property
    def inner_width(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.config.get("n_inner") or 4 * self.width

    def tensor(self, name: str) -> np.ndarray:
        """A weight as it is stored: projections are (in, out)."""
        entry = self._header[f"transformer.{name}"]
        if entry["dtype"] != "F32":
            raise PeerError(
                f"{self.directory}: {name} is stored as {entry['dtype']}; the converters read "
                "float32: save the model with GPT2.from_pretrained(..., dtype='float32')"
            )
        begin, end = entry["data_offsets"]
        return self._data[begin:end].view(np.float32).reshape(entry["shape"])

    def fingerprint(self) -> str:
        """Changes when the files do."""
        stamps = [
            (file.name, file.stat().st_size, file.stat().st_mtime_ns)
            for file in sorted(self.directory.glob("*.*"))
        ]
        stamps.append((str(self.directory.resolve()), 0, 0))
        return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:12]
