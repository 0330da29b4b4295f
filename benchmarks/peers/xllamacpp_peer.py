"""xllamacpp: https://github.com/xorbitsai/xllamacpp

llama.cpp's server, as a wheel built for AVX2, without the network in between.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf_file
import xllamacpp
from checkpoint import Checkpoint, PeerError
from engine import Prompts, Run
from gguf_file import WEIGHTS

__all__ = ["WEIGHTS", "Engine", "convert"]

_ENTRIES = 1280
"""Of each row's cache: the longest case of compare.py fits."""


def convert(checkpoint: Checkpoint, weights: str, target: Path) -> None:
    """Write a GGUF file whose tokens are numbers: the server answers with text."""
    gguf_file.convert(checkpoint, weights, target, numbered=True)


class Engine:
    """A server with a slot for each row."""

    version = f"{xllamacpp.__version__}, {xllamacpp.get_system_info().strip()}"

    def __init__(self, target: Path, weights: str, threads: int):
        self._target, self._threads = target, threads
        self._rows = 0
        self._server: Any = None

    def generate(self, prompts: Prompts, new: int) -> Run:
        """Continue every row by `new` tokens."""
        rows = len(prompts)
        if len(prompts[0]) + new > _ENTRIES:
            raise PeerError(f"{len(prompts[0])} + {new} tokens; rows have {_ENTRIES} entries here")
        if self._rows != rows:
            self._server = None  # its memory first
            self._server, self._rows = self._start(rows), rows
        # Tokens reach Python in bursts: a request for the first ones tells when they are there.
        prefill, tokens = self._timed(prompts, 1)
        if new == 1:
            return Run(prefill, 0.0, tokens)
        whole, tokens = self._timed(prompts, new)
        return Run(prefill, whole - prefill, tokens)

    def _timed(self, prompts: Prompts, new: int) -> tuple[float, list[list[int]]]:
        """Continue every row; returns the seconds until all are done, and the tokens."""
        together = threading.Barrier(len(prompts) + 1)
        with ThreadPoolExecutor(len(prompts)) as pool:
            waiting = [
                pool.submit(self._continue, list(prompt), new, together) for prompt in prompts
            ]
            together.wait()
            start = time.perf_counter()
            tokens = [future.result() for future in waiting]
            seconds = time.perf_counter() - start
        for row in tokens:
            if len(row) != new:
                raise PeerError(f"xllamacpp wrote {len(row)} tokens, not {new}")
        return seconds, tokens

    def _start(self, rows: int) -> Any:
        params = xllamacpp.CommonParams()
        params.model.path = str(self._target)
        params.n_ctx = rows * _ENTRIES
        params.n_parallel = rows
        params.kv_unified = False
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = self._threads
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.cache_prompt = False
        params.fit_params = False
        params.verbosity = 0
        return xllamacpp.Server(params)

    def _continue(self, prompt: list[int], new: int, together: threading.Barrier) -> list[int]:
        tokens: list[int] = []

        def note(part: Any) -> bool:
            text = part["choices"][0]["text"]
            if text:
                tokens.extend(map(int, text.split()))
            return False

        together.wait()
        self._server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": new,
                "samplers": ["top_k"],
                "top_k": 1,
                "ignore_eos": True,
                "cache_prompt": False,
                "stream": True,
            },
            note,
        )
        return tokens
