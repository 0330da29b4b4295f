"""Tokens a second of whole models on a GPU: a step and the choice of a token, in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from contest import Work
from gpt2fast import GPT2, PRESETS, backend
from gpt2fast.inference.cuda_graphs import CapturedStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")

LENGTH = 128


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("preset", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_decoding(compete, preset, batch):
    with torch.device("cuda"):
        model = GPT2(PRESETS[preset]).to(torch.bfloat16).eval()
    tokens = torch.randint(50257, (batch, LENGTH), device="cuda")

    def steps(name: str):
        with backend(name), torch.inference_mode():
            cache = model.new_cache(batch, LENGTH)
            model(tokens, cache=cache)
            taken = CapturedStep(model, batch, 1024, samples=False)
            taken.start(model, cache, LENGTH, tokens[:, -1])

        return lambda: taken.replay_at(LENGTH)

    weights = model.weight_bytes
    caches = batch * LENGTH * 2 * model.config.n_layer * model.config.n_embd * 2
    work = Work(weights + caches, tokens=batch)
    ways = {"ours": steps("native"), "ours (Triton)": steps("triton"), "torch": steps("torch")}
    compete(ways, [()], work, capture=False)
