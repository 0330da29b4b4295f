"""Token files of other projects: nanoGPT's raw arrays and llm.c's headed shards."""

from __future__ import annotations

import pickle
import struct
from array import array

import pytest
import torch

from gpt2fast.config import GPT2Config
from gpt2fast.data import DataModule, TokenDataset
from gpt2fast.errors import DataError


def headed(path, ids, version=1, magic=20240520, count=None):
    """A shard as llm.c's dev/data/data_common.py writes it."""
    header = array("i", [magic, version, len(ids) if count is None else count, *[0] * 253])
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(header.tobytes() + array("H" if version == 1 else "I", ids).tobytes())
    return path


def raw(path, ids, code="H"):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(array(code, ids).tobytes())
    return path


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "fineweb"
    for number, (start, stop) in enumerate([(0, 70), (70, 75), (75, 200)], 1):
        headed(folder / f"fineweb_train_{number:06}.bin", range(start, stop))
    headed(folder / "fineweb_val_000000.bin", range(500, 560))
    return folder


def quiet(data, *arguments, **more):
    with pytest.warns(UserWarning, match="llm.c's, nanoGPT's or NumPy's"):
        return DataModule(data, *arguments, **more)


@pytest.mark.parametrize("name", ["", "fineweb_train_*.bin"])
def test_shards_are_read_as_one_text(shards, name):
    data = quiet(shards / name, 10, 4)
    assert (data.meta.train_tokens, data.meta.val_tokens, data.meta.dtype) == (200, 60, "uint16")
    dataset = TokenDataset(shards / name, 10)
    assert len(dataset) == 190
    for start in (0, 55, 60, 62, 66, 69, 70, 74, 189, -1):
        x, y = dataset[start]
        assert x.tolist() == [*range(start % 190, start % 190 + 10)]
        assert torch.equal(y, x + 1)
    x, y = data.train_dataloader()[0]
    assert torch.equal(x, x[:, :1] + torch.arange(10)) and torch.equal(y, x + 1)
    targets = [t for _, y in data.val_dataloader() for t in y.flatten().tolist()]
    assert targets == [*range(501, 560)]


def test_every_window_of_shards_comes_once_in_an_epoch(shards):
    data = quiet(shards, 10, 1, sampling="epoch")
    batches = data.train_dataloader()
    seen = torch.cat([batches[i][0][0] for i in range(19)])
    assert sorted(seen.tolist()) == list(range(190))


def test_one_file_finds_its_counterpart(shards):
    for path in shards.glob("*train*[23].bin"):
        path.unlink()
    (shards / "fineweb_val_000000.bin").rename(shards / "fineweb_val_000001.bin")
    data = quiet(shards / "fineweb_train_000001.bin", 10, 4)
    assert (data.meta.train_tokens, data.meta.val_tokens) == (70, 60)


def test_32_bit_shards_are_read(tmp_path):
    ids = [128_000, 0, 3_000_000_000, 5, 7]
    for split in ("train", "val"):
        headed(tmp_path / "d" / f"{split}.bin", ids, version=7)
    data = quiet(tmp_path / "d", 2, 1)
    assert data.meta.dtype == "uint32"
    assert TokenDataset(tmp_path / "d", 4)[0][1].tolist() == ids[1:]


def test_nanogpt_files_are_raw(tmp_path):
    path = raw(tmp_path / "train.bin", range(3000))
    assert TokenDataset(path, 10)[0][0].tolist() == list(range(10))


def test_a_worker_maps_a_shard_again(shards):
    dataset = TokenDataset(shards, 10)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[66][0], dataset[66][0])


def cut(folder):
    path = folder / "fineweb_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-2])


BAD = {
    "cut": (cut, r"000002\.bin: the header tells of 5 uint16 tokens.* 1034 bytes, .* has 1032"),
    "longer": (
        lambda d: (d / "fineweb_train_000001.bin").open("ab").write(b"abcd"),
        r"header tells of 70 uint16 tokens.* 1164 bytes, but the file has 1168",
    ),
    "version": (
        lambda d: headed(d / "fineweb_train_000003.bin", [1] * 9, version=3),
        r"version 3 of llm\.c's token files is not known, only 1 \(uint16\) and 7 \(uint32\)",
    ),
    "negative": (
        lambda d: headed(d / "fineweb_train_000003.bin", [], count=-4),
        "header tells of -4 tokens",
    ),
    "empty": (lambda d: headed(d / "fineweb_train_000003.bin", []), "is empty"),
    "dtype": (
        lambda d: headed(d / "fineweb_train_000003.bin", [1] * 9, version=7),
        r"000001\.bin holds uint16 tokens and .*000003\.bin uint32 tokens",
    ),
    "splits": (
        lambda d: headed(d / "fineweb_val_000000.bin", [1] * 99, version=7),
        r"uint16 tokens and .* uint32 tokens; both splits",
    ),
    "no val": (lambda d: (d / "fineweb_val_000000.bin").unlink(), r"val\.bin does not exist"),
    "short val": (
        lambda d: headed(d / "fineweb_val_000000.bin", [1] * 10),
        "holds 10 tokens, a block_size of 10 needs at least 11",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_shard_is_named(shards, name):
    damage, message = BAD[name]
    damage(shards)
    with pytest.raises(DataError, match=message):
        DataModule(shards, 10, 2)


def test_a_file_without_magic_is_taken_for_raw(tmp_path):
    path = headed(tmp_path / "a.bin", range(50), magic=20240519)
    tokens = TokenDataset(path, 10).tokens
    assert tokens.count == 562
    assert tokens.slice(0, 2).tolist() == list(struct.unpack("<2H", struct.pack("<i", 20240519)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x_train_*.bin", r"does not exist|no file fits that name"),
        ("fineweb_val_*.bin", r"does not tell where the validation tokens are"),
    ],
)
def test_a_pattern_that_fits_nothing_is_named(shards, name, message):
    with pytest.raises(DataError, match=message):
        DataModule(shards / name, 10, 2)


def test_ids_beyond_the_model_are_found_in_a_later_shard(shards):
    data = quiet(shards, 10, 2)
    data.check_model(GPT2Config(vocab_size=560))
    with pytest.raises(DataError, match=r"token 199 is 199, outside .* vocab_size \(150\)"):
        data.check_model(GPT2Config(vocab_size=150))
