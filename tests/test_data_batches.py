"""Prepared data as batches, and the checks before a first step."""

# ruff: noqa: F401, F811 (imported fixtures)

from __future__ import annotations

import itertools
import json
import os
import pickle
import time
from array import array
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from gpt2fast.config import GPT2Config
from gpt2fast.data import DataModule, TokenDataset, prepare_data
from gpt2fast.data.text import END_OF_TEXT
from gpt2fast.errors import ConfigError, DataError
from gpt2fast.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from small_library import library, tokens_of


@pytest.fixture
def prepared(library, tmp_path):
    return prepare_data(library, tmp_path / "prepared", tokenizer="bpe", vocab_size=300).directory


def test_a_window_and_its_targets_are_one_token_apart(prepared):
    ids = tokens_of(prepared, "train")
    dataset = TokenDataset(prepared, 16)
    assert len(dataset) == len(ids) - 16
    for index in (0, 7, len(dataset) - 1, -1, -len(dataset)):
        start = index % len(dataset)
        x, y = dataset[index]
        assert x.dtype == y.dtype == torch.int64
        assert x.tolist() == ids[start : start + 16]
        assert y.tolist() == ids[start + 1 : start + 17]
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[index]
    x, _ = TokenDataset(prepared / "val.bin", 4)[0]
    assert x.tolist() == tokens_of(prepared, "val")[:4]
    x, _ = TokenDataset(prepared, 4, split="val")[0]
    assert x.tolist() == tokens_of(prepared, "val")[:4]


def test_a_dataset_works_in_a_data_loader(prepared):
    dataset = TokenDataset(prepared, 16)
    x, y = next(iter(DataLoader(dataset, batch_size=5, shuffle=True)))
    assert x.shape == y.shape == (5, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    copy = pickle.dumps(dataset)  # as for a worker process
    assert len(copy) < 1000
    assert torch.equal(pickle.loads(copy)[3][0], dataset[3][0])


def test_token_ids_above_the_signed_range_are_read(tmp_path):
    (tmp_path / "a.bin").write_bytes(array("H", [0, 40_000, 65_535, 1]).tobytes())
    x, y = TokenDataset(tmp_path / "a.bin", 3)[0]
    assert x.tolist() == [0, 40_000, 65_535] and y.tolist() == [40_000, 65_535, 1]
    (tmp_path / "b.bin").write_bytes(array("I", [0, 3_000_000_000, 1]).tobytes())
    x, y = TokenDataset(tmp_path / "b.bin", 2, dtype="uint32")[0]
    assert x.tolist() == [0, 3_000_000_000]


def test_batch_s_depends_on_seed_and_s_alone(prepared):
    def first(count, start_step=0, **changes):
        arguments = {"block_size": 8, "batch_size": 3, "seed": 1} | changes
        loader = DataModule(prepared, **arguments).train_dataloader(start_step)
        return [x.tolist() for x, _ in itertools.islice(loader, count)]

    straight = first(6)
    assert first(6) == straight
    assert first(3, start_step=3) == straight[3:]
    assert first(6, seed=2) != straight
    assert len({str(batch) for batch in straight}) == 6
    loader = DataModule(prepared, 8, 3, seed=1).train_dataloader()
    assert [next(iter(loader))[0].tolist(), loader[4][0].tolist()] == [straight[0], straight[4]]


def test_training_windows_come_from_everywhere_in_the_text(tmp_path):
    (tmp_path / "train.bin").write_bytes(array("H", range(20)).tobytes())
    (tmp_path / "val.bin").write_bytes(array("H", range(20)).tobytes())
    with pytest.warns(UserWarning):
        data = DataModule(tmp_path, block_size=4, batch_size=500)
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == y.shape == (500, 4)
    assert x.is_contiguous() and y.is_contiguous()
    assert set(x[:, 0].tolist()) == set(range(16))  # every start that has a target
    assert torch.equal(y, x + 1)
    assert torch.equal(x - x[:, :1], torch.arange(4).expand(500, 4))


@pytest.mark.parametrize("block_size", [1, 7, 10, 39, 40])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_validation_predicts_every_token_but_the_first_once(tmp_path, block_size, batch_size):
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(array("H", range(41)).tobytes())
    with pytest.warns(UserWarning):
        data = DataModule(tmp_path, block_size, batch_size)
    loader = data.val_dataloader()
    batches = list(loader)
    assert [t for _, y in batches for t in y.flatten().tolist()] == [*range(1, 41)]
    assert all(torch.equal(x, y - 1) for x, y in batches)
    assert all(x.shape[0] <= batch_size and x.shape[1] <= block_size for x, _ in batches)
    assert len(batches) == len(loader)
    assert [x.tolist() for x, _ in loader] == [x.tolist() for x, _ in batches]


def test_a_batch_takes_less_than_a_millisecond(prepared):
    loader = iter(DataModule(prepared, block_size=128, batch_size=64).train_dataloader())
    times = []
    for _ in range(50):
        start = time.perf_counter()
        next(loader)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


def test_characters_per_token_turn_a_loss_into_nats_per_character(prepared):
    data = DataModule(prepared, 8, 2)
    val = tokens_of(prepared, "val")
    text = data.tokenizer.decode(val).replace(END_OF_TEXT, "x")
    assert data.meta.characters_per_token("val") == pytest.approx(len(text) / len(val))
    train = data.meta.train_characters / data.meta.train_tokens
    assert data.meta.characters_per_token("train") == train


# -- checks before the first step ----------------------------------------------------------------


def change_meta(directory: Path, **changes) -> None:
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps(meta | changes))


def put(directory: Path, split: str, ids: list[int]) -> None:
    (directory / f"{split}.bin").write_bytes(array("H", ids).tobytes())
    change_meta(directory, **{f"{split}_tokens": len(ids)})


def other_tokenizer(directory: Path) -> None:
    BPETokenizer.train(["something else entirely " * 9], 300).save_pretrained(directory)


BAD_DATA = {
    "empty": (lambda d: put(d, "val", []), r"val\.bin is empty"),
    "short": (lambda d: put(d, "val", [1] * 8), r"holds 8 tokens, a block_size of 8 needs .* 9"),
    "ids": (lambda d: put(d, "train", [1] * 99 + [300]), r"token 99 is 300, outside .* \(300\)"),
    "high ids": (lambda d: put(d, "val", [1] * 9 + [65535]), r"token 9 is 65535"),
    "folder": (
        lambda d: [(d / "train.bin").unlink(), (d / "train.bin").mkdir()],
        r"train\.bin is a folder",
    ),
    "odd size": (lambda d: (d / "val.bin").write_bytes(b"abc"), "3 bytes are not a whole number"),
    "cut": (lambda d: (d / "val.bin").write_bytes(b"ab" * 50), r"holds 50 tokens, meta\.json says"),
    "no val.bin": (lambda d: (d / "val.bin").unlink(), r"val\.bin does not exist.*prepare"),
    "foreign": (other_tokenizer, "are not those that the data were made with"),
    "no tokenizer": (
        lambda d: (
            [(d / n).unlink() for n in os.listdir(d) if n[-3:] != "bin" and n[0] != "m"]
            + [(d / "merges.txt").unlink()]
        ),
        "the tokenizer of the data",
    ),
    "torn meta": (lambda d: (d / "meta.json").write_text("{"), r"meta\.json cannot be read"),
    "list": (lambda d: (d / "meta.json").write_text("[]"), r"format is 'list'"),
    "format": (lambda d: change_meta(d, format=2), r"format is 2, this version reads 1"),
    "type": (lambda d: change_meta(d, vocab_size="300"), r"vocab_size is '300', of the wrong type"),
    "bool": (lambda d: change_meta(d, train_tokens=True), r"train_tokens is True"),
    "negative": (lambda d: change_meta(d, val_characters=-1), r"val_characters is -1"),
    "dtype": (lambda d: change_meta(d, dtype="int8"), r"dtype is 'int8', not uint16 or uint32"),
    "missing": (
        lambda d: (d / "meta.json").write_text('{"format": 1, "dtype": "uint16"}'),
        r"vocab_size, train_tokens.* missing",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_caught_before_the_first_step(prepared, name):
    damage, message = BAD_DATA[name]
    DataModule(prepared, block_size=8, batch_size=2)
    damage(prepared)
    with pytest.raises(DataError, match=message):
        DataModule(prepared, block_size=8, batch_size=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 10**6}, "a block_size of 1000000 needs"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"data_dir": "nowhere"}, "nowhere is not a directory of prepared data.*prepare"),
    ],
)
def test_impossible_batches_are_refused(prepared, arguments, message):
    with pytest.raises(DataError, match=message):
        DataModule(**{"data_dir": prepared, "block_size": 8, "batch_size": 2} | arguments)


def test_a_model_that_cannot_take_the_data_is_refused(prepared):
    data = DataModule(prepared, block_size=8, batch_size=2)
    data.check_model(GPT2Config(vocab_size=300, n_positions=8))
    data.check_model(GPT2Config(vocab_size=304, n_positions=64))  # padded
    with pytest.raises(DataError, match="vocabulary of 300 tokens, the model's vocab_size is 299"):
        data.check_model(GPT2Config(vocab_size=299))
    with pytest.raises(ConfigError, match="block_size 8 is more than the model's n_positions 7"):
        data.check_model(GPT2Config(vocab_size=300, n_positions=7))


def test_the_tokenizer_of_another_model_is_refused(prepared):
    data = DataModule(prepared, block_size=8, batch_size=2)
    data.check_tokenizer(Tokenizer.from_pretrained(prepared))
    with pytest.raises(DataError, match="another tokenizer .bpe, 300 tokens.*--tokenizer"):
        data.check_tokenizer(CharTokenizer.train(["abc"]))


def test_nanogpt_data_are_read_and_their_pickle_does_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Trap()))
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(array("H", [5, 50_256] * 20).tobytes())
    with (
        pytest.warns(UserWarning, match=r"no meta\.json.*NumPy's, uint16 tokens of an unknown"),
        pytest.warns(UserWarning, match=r"without a tokenizer: .*meta\.pkl .*could run code"),
    ):
        data = DataModule(tmp_path, block_size=8, batch_size=2)
    assert not (tmp_path / "sprung").exists()
    assert data.tokenizer is None
    assert data.meta.characters_per_token() is None
    assert next(iter(data.val_dataloader()))[0][0].tolist() == [5, 50_256] * 4
    data.check_model(GPT2Config())
    with pytest.raises(DataError, match="token 1 is 50256, outside the model's vocab_size"):
        data.check_model(GPT2Config(vocab_size=50_256))
    with pytest.warns(UserWarning, match="uint32 tokens"):
        data = DataModule(tmp_path, block_size=8, batch_size=2, dtype="uint32")
    assert data.meta.train_tokens == 20


def test_nanogpts_characters_come_with_its_data(tmp_path):
    text = "héllo wörld\n" * 30
    characters = sorted(set(text))
    ids = {character: id for id, character in enumerate(characters)}
    meta = {"vocab_size": len(ids), "itos": dict(enumerate(characters)), "stoi": ids}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    tokens = array("H", [ids[character] for character in text])
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(tokens.tobytes())
    with pytest.warns(UserWarning, match="uint16 tokens of meta.pkl's characters"):
        data = DataModule(tmp_path, block_size=8, batch_size=2)
    assert data.tokenizer.encode("wörld") == [ids[character] for character in "wörld"]
    assert data.meta.vocab_size == len(ids) and data.meta.characters_per_token() == 1
    with pytest.raises(DataError, match="another tokenizer"):
        data.check_tokenizer(CharTokenizer.train(["abc"]))
    (tmp_path / "train.bin").write_bytes(array("H", [0, len(ids)] * 20).tobytes())
    with (
        pytest.raises(DataError, match=f"token 1 is {len(ids)}, outside the vocabulary"),
        pytest.warns(UserWarning),
    ):
        DataModule(tmp_path, block_size=8, batch_size=2)
