"""transformers: https://github.com/huggingface/transformers"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import transformers
from engine import Prompts, Run
from transformers import GPT2LMHeadModel, StoppingCriteria

WEIGHTS = ("float32", "bfloat16")


class Engine:
    """`generate` with its defaults: a dynamic cache and torch's scaled_dot_product_attention."""

    version = f"{transformers.__version__}, torch {torch.__version__}"

    def __init__(self, target: Path, weights: str, threads: int):
        torch.set_num_threads(threads)
        self._model = GPT2LMHeadModel.from_pretrained(target, dtype=weights).eval()

    def generate(self, prompts: Prompts, new: int) -> Run:
        """Continue every row by `new` tokens."""
        ids = torch.tensor(prompts)
        clock = _Clock()
        start = time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
        end = time.perf_counter()
        first = clock.first or end
        return Run(first - start, end - first, out[:, ids.shape[1] :].tolist())


class _Clock(StoppingCriteria):
    """Notes when the first tokens are there; stops nothing."""

    first: float | None = None

    def __call__(self, input_ids, scores, **_):
        if self.first is None:
            self.first = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)
