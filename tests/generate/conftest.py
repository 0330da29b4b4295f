"""A small model, and a command line that writes with it."""

from __future__ import annotations

import io
import os
import sys

import pytest
import torch

from generate_command import TEXT
from gpt2fast import GPT2, GPT2Config, backend
from gpt2fast.cli.generate import main
from gpt2fast.inference.generator import Generator
from gpt2fast.tokenizer import BPETokenizer


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A small random model with its tokenizer, as `save_pretrained` writes it."""
    tokenizer = BPETokenizer.train([TEXT * 10], 300)
    torch.manual_seed(1)
    model = GPT2(
        GPT2Config(
            vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=2,
            initializer_range=0.2, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def generator(model_dir):
    return Generator.from_pretrained(model_dir, window="slide", notify=lambda message: None)


@pytest.fixture(autouse=True)
def default_backend():
    yield
    backend("auto")


@pytest.fixture
def run(model_dir, capsys, monkeypatch):
    """Run the command line here; returns exit code, standard output and standard error."""

    def run(*arguments, stdin=None, model=model_dir):
        if stdin is None:
            monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
        else:
            data = stdin if isinstance(stdin, bytes) else stdin.encode()
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        place = [] if model is None else ["--model", str(model)]
        try:
            code = main([*place, *(str(argument) for argument in arguments)])
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
