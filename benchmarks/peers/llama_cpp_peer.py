"""llama.cpp: https://github.com/ggml-org/llama.cpp"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
from checkpoint import PeerError
from engine import Prompts, Run
from gguf_file import WEIGHTS, convert

__all__ = ["WEIGHTS", "Engine", "convert"]


class Engine:
    """libllama through llama_cpp_shim.cpp, which lies beside the environment that runs this."""

    def __init__(self, target: Path, weights: str, threads: int):
        library = Path(sys.prefix) / "lib" / "libllama_cpp_shim.so"
        if not library.is_file():
            raise PeerError(f"{library} does not exist: run setup_peers.py")
        self._library = ctypes.CDLL(str(library))
        self._library.peer_load.restype = ctypes.c_void_p
        self._library.peer_system.restype = ctypes.c_char_p
        self._peer = ctypes.c_void_p(self._library.peer_load(str(target).encode(), threads))
        if not self._peer:
            raise PeerError(f"libllama cannot load {target}")
        self.version = self._library.peer_system().decode()

    def generate(self, prompts: Prompts, new: int) -> Run:
        """Continue every row by `new` tokens."""
        ids = np.array(prompts, np.int32)
        out = np.zeros((len(ids), new), np.int32)
        seconds = np.zeros(2)
        failed = self._library.peer_generate(
            self._peer,
            ids.ctypes.data_as(ctypes.c_void_p),
            *ids.shape,
            new,
            out.ctypes.data_as(ctypes.c_void_p),
            seconds.ctypes.data_as(ctypes.c_void_p),
        )
        if failed:
            raise PeerError(f"llama_decode returned {failed} for {ids.shape} + {new} tokens")
        return Run(seconds[0].item(), seconds[1].item(), out.tolist())
