"""The bundled model's card, compared with its files."""

from __future__ import annotations

import logging
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2, Tokenizer
from gpt2fast.data import DataModule, prepare_data

FOLDER = Path(str(files("gpt2fast") / "assets" / "adventures"))


def test_it_is_small_and_has_its_card():
    assert (FOLDER / "model.safetensors").stat().st_size < 10e6
    assert GPT2.from_pretrained("adventures").config.parameter_count == 3_749_376
    assert Tokenizer.from_pretrained("adventures").vocab_size == 2048
    assert "1.145 nats per character" in (FOLDER / "README.md").read_text()


def test_transformers_loads_it_without_a_warning(caplog, recwarn):
    transformers = pytest.importorskip("transformers")
    with caplog.at_level(logging.WARNING):
        theirs = transformers.GPT2LMHeadModel.from_pretrained(FOLDER, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert not caplog.records and not recwarn.list
    text = "Once upon a time there was an old wolf."
    ids = Tokenizer.from_pretrained("adventures").encode(text)
    assert tokenizer(text)["input_ids"] == ids
    ours = GPT2.from_pretrained("adventures", dtype=torch.float32).eval()
    with torch.no_grad():
        batch = torch.tensor([ids])
        assert (ours(batch).logits - theirs(batch).logits).abs().max() < 1e-4


def test_its_loss_on_the_held_out_books_is_the_cards(data_dir, tmp_path):
    prepare_data(
        [data_dir / "adventure_books.txt"],
        tmp_path / "data",
        tokenizer=str(FOLDER),
        split="documents",
        val_fraction=0.05,
    )
    data = DataModule(tmp_path / "data", block_size=256, batch_size=16)
    assert data.meta.val_tokens == 210_170
    model = GPT2.from_pretrained("adventures", dtype=torch.float32).eval()
    total = 0.0
    with torch.no_grad():
        for input_ids, targets in data.val_dataloader():
            loss = model(input_ids, targets=targets).loss
            total += loss.item() * int((targets != -100).sum())
    assert abs(total / data.meta.val_characters - 1.145) < 0.002
