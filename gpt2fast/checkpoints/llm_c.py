"""llm.c's model files (gpt2_124M.bin, log124M/model_00018865.bin), read as they are on the disk.

256 little-endian int32 numbers, then the parameters in the order and shapes of `_tensors`:

    0  magic, 20240326            4  layers
    1  version, 3 or 5            5  heads
    2  positions                  6  width
    3  token ids                  7  rows of the token embedding, padding included

Version 3 holds float32, version 5 bfloat16; projections are (out, in), as in nn.Linear. Its GPT-2
has the tanh form of GELU and a tied output projection.
https://github.com/karpathy/llm.c (write_model in train_gpt2.py, gpt2_write_to_checkpoint)
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch import Tensor

from .._system.pickle_check import Objection
from ..config import PRESETS, GPT2Config, block_shapes
from ..errors import ConfigError

MAGIC = struct.pack("<i", 20240326)
"""The first bytes of a model file."""

OTHER_FILES = {
    struct.pack("<i", 20240327): "llm.c's activations and gradients for debugging",
    struct.pack("<i", 20240328): "llm.c's tokenizer",
    struct.pack("<i", 20240520): "llm.c's training data (token ids)",
    struct.pack("<i", 20240522): "llm.c's examples for evaluation",
    struct.pack("<i", 20240527): "llm.c's optimizer; the weights are in the model_….bin beside it",
    struct.pack("<i", 20240801): "llm.c's training data (token ids)",
    struct.pack("<i", 20240803): "llm.c's LLaMA 3",
}
"""llm.c's other files, by their first bytes."""

_HEADER = struct.Struct("<256i")
_DTYPES = {3: torch.float32, 5: torch.bfloat16}


def read_llm_c(file: IO[bytes]) -> tuple[dict[str, Tensor], GPT2Config]:
    """Tensors by GPT-2's names, and the configuration; memory-mapped, copy-on-write.

    Raises:
        Objection: another version, sizes that no GPT-2 has, or another length.
    """
    header = file.read(_HEADER.size)
    size = file.seek(0, 2)
    if len(header) < _HEADER.size:
        raise Objection(f"is the beginning of llm.c's model file: it has {size} bytes")
    _, version, positions, vocabulary, layers, heads, width, rows = _HEADER.unpack(header)[:8]
    if version not in _DTYPES or not rows:
        raise Objection(
            f"is llm.c's model file of version {version}"
            + ("" if rows else " without padded vocabulary")
            + "; read are 3 (float32) and 5 (bfloat16): write it again with its train_gpt2.py"
        )
    end = PRESETS["gpt2"].vocab_size - 1
    special = end if vocabulary == end + 1 else None  # others have ids of their own
    try:
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=positions,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            bos_token_id=special,
            eos_token_id=special,
            dropout=0.0,
        )
    except ConfigError as error:
        raise Objection(f"is llm.c's model file with a header that no GPT-2 has: {error}") from None
    if rows < vocabulary:
        raise Objection(f"has {vocabulary} token ids, and a token embedding of {rows} rows")
    dtype = _DTYPES[version]
    count = sum(math.prod(shape) * repeated for _, shape, repeated in _tensors(config, rows))
    expected = _HEADER.size + count * dtype.itemsize
    if size != expected:
        raise Objection(
            f"is llm.c's model file of {layers} layers and width {width}, which has {expected} "
            f"bytes, but it has {size}: download or copy it again"
        )
    mapped: Any = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    numbers = torch.frombuffer(mapped, dtype=dtype, offset=_HEADER.size)
    found: dict[str, Tensor] = {}
    start = 0
    for name, shape, repeated in _tensors(config, rows):
        length = math.prod(shape)
        for layer in range(repeated):
            tensor = numbers[start : start + length].view(shape)
            found[name.format(layer)] = tensor[:vocabulary] if name == "wte.weight" else tensor
            start += length
    return found, config


def _tensors(config: GPT2Config, rows: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Names, shapes and how often they come, one layer after the other."""
    width, layers = config.n_embd, config.n_layer
    yield "wte.weight", (rows, width), 1
    yield "wpe.weight", (config.n_positions, width), 1
    for name, shape in block_shapes(width, 4 * width).items():
        yield f"h.{{}}.{name}", shape[::-1], layers
    yield "ln_f.weight", (width,), 1
    yield "ln_f.bias", (width,), 1
