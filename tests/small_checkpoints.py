"""A tiny model with random weights, and comparisons of models, for tests of checkpoints."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2, GPT2Config

TINY = GPT2Config(
    vocab_size=61,
    n_positions=24,
    n_embd=24,
    n_layer=2,
    n_head=3,
    bos_token_id=None,
    eos_token_id=60,
    dropout=0.0,
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def random_model(config: GPT2Config = TINY, dtype: torch.dtype = torch.float32) -> GPT2:
    """No parameter at its initial zero or one: a swapped or lost one shows."""
    torch.manual_seed(0)
    model = GPT2(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


def tokens(config: GPT2Config = TINY) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))


def assert_same_parameters(loaded: GPT2, expected: GPT2) -> None:
    ours, theirs = loaded.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), name


def write_config(folder: Path, config: GPT2Config = TINY, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps(config.to_dict() | changes))


def openai_name(name: str) -> str:
    name = re.sub(r"^h\.(\d+)", r"h\1", name)
    name = re.sub(r"(wte|wpe)\.weight$", r"\1", name)
    name = re.sub(r"(ln_\w)\.weight$", r"\1.g", name)
    return "model/" + re.sub(r"\.bias$", ".b", re.sub(r"\.weight$", ".w", name)).replace(".", "/")


@pytest.fixture
def big(tmp_path):
    """A directory for hundreds of megabytes, emptied after the test."""
    folder = tmp_path / "big"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)
