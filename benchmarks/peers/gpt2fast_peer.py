"""gpt2fast itself, through the loop that `GPT2.generate` and `Generator` run."""

from __future__ import annotations

from pathlib import Path

import torch
from engine import Prompts, Run

import gpt2fast
from gpt2fast import GPT2
from gpt2fast.inference.decoding import Timing, decode
from gpt2fast.inference.stopping import StopCriteria
from gpt2fast.ops import native
from gpt2fast.sampling import SamplingOptions

WEIGHTS = ("float32", "bfloat16", "float16", "int8", "int4")


def _kernels() -> str:
    library = native.loaded()
    return f"{library.isa} kernels" if library else "torch's operations"


class Engine:
    """A model in evaluation mode."""

    version = f"{gpt2fast.__version__}, {_kernels()}, torch {torch.__version__}"

    def __init__(self, target: Path, weights: str, threads: int):
        torch.set_num_threads(threads)
        quantized = weights.startswith("int")
        model = GPT2.from_pretrained(target, dtype="float32" if quantized else weights).eval()
        if quantized:
            # Speed does not depend on how well the weights are rounded: take the quick way.
            model = model.quantize(weights, method="nearest", release=True)
        self._model = model

    def generate(self, prompts: Prompts, new: int) -> Run:
        """Continue every row by `new` tokens."""
        timing = Timing()
        options = SamplingOptions(max_new_tokens=new)
        rows: list[list[int]] = [[] for _ in prompts]
        limits = [new] * len(prompts)
        for step in decode(self._model, prompts, limits, options, StopCriteria([]), timing=timing):
            for row, token in zip(step.rows, step.tokens, strict=True):
                rows[row].append(token)
        return Run(timing.prefill_seconds, timing.decode_seconds, rows, timing.decode_bytes)
