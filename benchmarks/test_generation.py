"""Generation end to end against transformers: GPT-2 124M with random weights, greedy."""

from __future__ import annotations

import pytest
import torch

from gpt2fast import GPT2, GPT2Config

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2(GPT2Config()).save_pretrained(folder)
    return (
        GPT2.from_pretrained(folder).eval(),
        transformers.GPT2LMHeadModel.from_pretrained(folder).eval(),
    )


@pytest.mark.parametrize(("batch", "prompt", "new"), [(1, 128, 64), (8, 128, 16), (1, 768, 1)])
def test_greedy_generation_against_transformers(versus, models, batch, prompt, new):
    ours, theirs = models
    ids = torch.randint(50257, (batch, prompt))

    def run_ours():
        return ours.generate(ids, max_new_tokens=new, eos_token_id=None)

    def run_theirs():
        return theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )

    assert run_ours().shape == run_theirs().shape
    versus(run_ours, run_theirs, rounds=3)
