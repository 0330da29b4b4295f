"""OpenAI's TensorFlow checkpoints: what was written into one is what is loaded from it.

The writer here makes the format from its description, with Google's protobuf for the messages and
pyarrow for Snappy. (Checkpoints that TensorFlow wrote, those of TensorFlow Serving's tests, with
and without compression, were read with the same code once.)
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from torch import Tensor

from gpt2fast import GPT2, GPT2Config
from gpt2fast.checkpoints.tensorflow_files import _masked_crc32c, _snappy, read_bundle
from gpt2fast.cli.generate import main as generate
from gpt2fast.errors import ConfigError, Error, WeightsError
from gpt2fast.tokenizer.merges import BYTE_TO_CHAR
from small_checkpoints import LINEAR, TINY, assert_same_parameters, openai_name, random_model

CONFIG = replace(TINY, eos_token_id=None, dropout=0.1)
DTYPES = {torch.float32: 1, torch.float64: 2, torch.int64: 9, torch.bfloat16: 14, torch.float16: 19}


def messages() -> dict[str, type]:
    """The messages of tensor_bundle.proto and tensor_shape.proto, of their public descriptions."""
    file = descriptor_pb2.FileDescriptorProto(name="bundle.proto", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in {
        "Version": [("producer", 1, kinds.TYPE_INT32)],
        "Header": [
            ("num_shards", 1, kinds.TYPE_INT32),
            ("endianness", 2, kinds.TYPE_INT32),
            ("version", 3, "Version"),
        ],
        "Dim": [("size", 1, kinds.TYPE_INT64), ("name", 2, kinds.TYPE_STRING)],
        "Shape": [("dim", 2, "*Dim"), ("unknown_rank", 3, kinds.TYPE_BOOL)],
        "Entry": [
            ("dtype", 1, kinds.TYPE_INT32),
            ("shape", 2, "Shape"),
            ("shard_id", 3, kinds.TYPE_INT32),
            ("offset", 4, kinds.TYPE_INT64),
            ("size", 5, kinds.TYPE_INT64),
            ("crc32c", 6, kinds.TYPE_FIXED32),
            ("slices", 7, "*Shape"),
        ],
    }.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            many = isinstance(kind, str) and kind.startswith("*")
            message.field.add(
                name=field,
                number=number,
                label=kinds.LABEL_REPEATED if many else kinds.LABEL_OPTIONAL,
                type=kinds.TYPE_MESSAGE if isinstance(kind, str) else kind,
                type_name="." + kind.removeprefix("*") if isinstance(kind, str) else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        message.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(message.name))
        for message in file.message_type
    }


MESSAGES = messages()


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def block(entries: list[tuple[bytes, bytes]], compressed: bool) -> bytes:
    out, restarts, before = b"", [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % 16 == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        before = key
    out += struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))
    if compressed:
        out = pyarrow.compress(out, codec="snappy", asbytes=True)
    out += bytes([compressed])
    crc = crc32c(out)
    return out + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def table(entries: Mapping[bytes, bytes], compressed: bool = False, per_block: int = 20) -> bytes:
    out, index = b"", []
    items = sorted(entries.items())
    for start in range(0, len(items), per_block):
        part = items[start : start + per_block]
        written = block(part, compressed)
        index.append((part[-1][0] + b"\0", varint(len(out)) + varint(len(written) - 5)))
        out += written
    handles = b""
    for part in ([], index):  # the meta index, and the index
        written = block(part, compressed and bool(part))
        handles += varint(len(out)) + varint(len(written) - 5)
        out += written
    return out + handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def bundle(
    folder: Path,
    tensors: Mapping[str, Tensor],
    prefix: str = "model.ckpt",
    *,
    shards: int = 1,
    compressed: bool = False,
    changes: Mapping[str, object] | None = None,
    header: dict[str, object] | None = None,
) -> Path:
    """Write a checkpoint; `changes` are made to every entry."""
    parts = [b""] * shards
    told = {"num_shards": shards, "version": MESSAGES["Version"](producer=1)} | (header or {})
    entries = {b"": MESSAGES["Header"](**told).SerializeToString()}
    for i, (name, tensor) in enumerate(tensors.items()):
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        fields = {
            "dtype": DTYPES[tensor.dtype],
            "shape": MESSAGES["Shape"](dim=[MESSAGES["Dim"](size=n) for n in tensor.shape]),
            "shard_id": i % shards,
            "offset": len(parts[i % shards]),
            "size": len(data),
            "crc32c": 7,
        }
        parts[i % shards] += data
        message = MESSAGES["Entry"](**fields | dict(changes or {}))
        entries[name.encode()] = message.SerializeToString()
    for i, part in enumerate(parts):
        (folder / f"{prefix}.data-{i:05d}-of-{shards:05d}").write_bytes(part)
    path = folder / f"{prefix}.index"
    path.write_bytes(table(entries, compressed))
    return path


def openai_tensors(model: GPT2) -> dict[str, Tensor]:
    """The model as OpenAI's code has it: 1-D convolutions for projections."""
    return {
        openai_name(name): tensor[None] if name.endswith(LINEAR) else tensor
        for name, tensor in model.state_dict().items()
    }


def hparams(config: GPT2Config, **changes: object) -> str:
    names = {
        "n_vocab": config.vocab_size,
        "n_ctx": config.n_positions,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
    }
    return json.dumps(names | changes)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_openais_release_gives_the_weights_that_were_written(tmp_path, shards, compressed, dtype):
    model = random_model(CONFIG, dtype)
    path = bundle(tmp_path, openai_tensors(model), shards=shards, compressed=compressed)
    (tmp_path / "hparams.json").write_text(hparams(CONFIG))
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    (tmp_path / "config.json").write_text("{}")  # hparams.json describes it
    for place in (tmp_path, path):
        loaded = GPT2.from_pretrained(place)
        assert loaded.config == CONFIG
        assert_same_parameters(loaded, model)
    with pytest.raises(WeightsError, match=f"give its folder {tmp_path}"):
        GPT2.from_pretrained(tmp_path / "model.ckpt")


def test_a_training_checkpoint_loads_without_its_optimizer(tmp_path):
    model = random_model(CONFIG)
    tensors = openai_tensors(model)
    for name in list(tensors):
        tensors |= {f"{name}/Adam": tensors[name] * 2, f"{name}/Adam_1": tensors[name] * 3}
    bundle(tmp_path, tensors, "model-900")
    bundle(tmp_path, {name: tensor + 1 for name, tensor in tensors.items()}, "model-1000")
    (tmp_path / "hparams.json").write_text(hparams(CONFIG))
    with pytest.raises(WeightsError, match=r"several.*model-1000\.index, model-900\.index"):
        GPT2.from_pretrained(tmp_path)
    (tmp_path / "checkpoint").write_text(
        'model_checkpoint_path: "/home/me/run1/model-900"\n'
        'all_model_checkpoint_paths: "model-1000"\n'
    )
    assert_same_parameters(GPT2.from_pretrained(tmp_path), model)


def test_without_a_description_the_shapes_or_config_json_tell(tmp_path):
    model = random_model(CONFIG)
    bundle(tmp_path, openai_tensors(model))
    with pytest.raises(WeightsError, match="does not say what model it holds"):
        GPT2.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    assert_same_parameters(GPT2.from_pretrained(tmp_path), model)
    for text in ("{}", "[]", "x", hparams(CONFIG, n_head=5), hparams(CONFIG, n_layer="2")):
        (tmp_path / "hparams.json").write_text(text)
        with pytest.raises(ConfigError, match=r"hparams\.json"):
            GPT2.from_pretrained(tmp_path)
    (tmp_path / "hparams.json").write_text(hparams(CONFIG, n_layer=3))
    with pytest.raises(WeightsError, match="12 missing: h.2"):
        GPT2.from_pretrained(tmp_path)


def test_the_whole_release_generates(tmp_path, capsys):
    vocab = {character: byte for byte, character in BYTE_TO_CHAR.items()}
    config = replace(CONFIG, vocab_size=256, dropout=None)
    bundle(tmp_path, openai_tensors(random_model(config)))
    (tmp_path / "hparams.json").write_text(hparams(config))
    (tmp_path / "encoder.json").write_text(json.dumps(vocab))
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    options = ["--greedy", "--max-new-tokens", "3", "--window", "stop", "ab"]
    assert generate(["--model", str(tmp_path), *options]) == 0
    assert capsys.readouterr().out.startswith("ab")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"changes": {"size": 3}}, "says that 'a' has the shape"),
        ({"changes": {"offset": 2**40}}, "says that 'a' has the shape"),
        ({"changes": {"offset": -1}}, "says that 'a' has the shape"),
        ({"changes": {"shard_id": 1}}, "data file 1 of 1"),
        ({"changes": {"shard_id": -1}}, "data file"),
        ({"changes": {"dtype": 2}}, "says that 'a' has the shape"),
        ({"changes": {"slices": [{}]}}, "in slices"),
        ({"changes": {"shape": {"dim": [{"size": 2**62}, {"size": 4}]}}}, "says that 'a' has the"),
        ({"changes": {"shape": {"dim": [{"size": -1}]}}}, "says that 'a' has the shape"),
        ({"changes": {"shape": {"dim": [{"size": 1}] * 70}}}, "says that 'a' has the shape"),
        ({"header": {"num_shards": 2}}, "00000-of-00002 cannot be read"),
        ({"header": {"num_shards": 0}}, "0 data files"),
        ({"header": {"num_shards": 2**31 - 1}}, "2147483647 data files"),
        ({"header": {"endianness": 1}}, "big-endian"),
    ],
)
def test_a_bundle_that_claims_what_is_not_there_is_refused(tmp_path, changes, reason):
    index = bundle(tmp_path, {"a": torch.arange(6.0).view(2, 3)}, **changes)
    with pytest.raises(WeightsError, match=rf"model\.ckpt\..*{reason}"):
        read_bundle(index)


def test_tensors_that_share_bytes_are_refused(tmp_path):
    index = bundle(tmp_path, dict.fromkeys("ab", torch.ones(9)), changes={"offset": 0})
    read_bundle(index)
    (tmp_path / "model.ckpt.data-00000-of-00001").write_bytes(b"\0" * 40)
    with pytest.raises(WeightsError, match="more bytes than"):
        read_bundle(index)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_index_is_one_error(tmp_path, compressed):
    model = random_model(CONFIG)
    (tmp_path / "hparams.json").write_text(hparams(CONFIG))
    index = bundle(tmp_path, openai_tensors(model), compressed=compressed)
    whole = index.read_bytes()
    generator = random.Random(0)
    changed = [whole[:-1], whole[:20], b"", whole[-48:], whole[:-48], whole + whole[:3]]
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(generator.choice([1, 1, 3, 20])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        changed.append(bytes(damaged))
    refused = 0
    for damaged in changed:
        index.write_bytes(damaged)
        try:  # the footer's padding and the meta index may be anything
            assert_same_parameters(GPT2.from_pretrained(index), model)
        except Error as error:
            assert "model.ckpt.index" in str(error)
            refused += 1
    assert refused > 140


def test_damage_behind_the_checksums_is_one_error(tmp_path):
    """The same damage, with checksums of the damaged blocks."""
    generator = random.Random(1)
    entries = {b"": b"\x08\x01\x1a\x02\x08\x01", b"a": b"\x08\x01\x12\x02\x12\x00\x28\x04"}
    (tmp_path / "x.data-00000-of-00001").write_bytes(b"\0" * 4)
    index = tmp_path / "x.index"
    for _ in range(300):
        broken = {}
        for key, value in entries.items():
            data = bytearray(value + bytes(generator.randrange(256) for _ in range(3)))
            data[generator.randrange(len(data))] = generator.randrange(256)
            broken[key] = bytes(data[: generator.randrange(len(data) + 1)])
        index.write_bytes(table(broken))
        try:
            read_bundle(index)
        except WeightsError as error:
            assert str(tmp_path / "x.") in str(error)


def test_checksums_and_snappy_are_the_published_ones():
    crc = crc32c(b"123456789")
    assert crc == 0xE3069283
    assert _masked_crc32c(b"123456789") == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    generator = random.Random(0)
    for length in (0, 1, 59, 60, 61, 256, 257, 5000, 70_000):
        for letters in (1, 2, 256):
            data = bytes(generator.randrange(letters) for _ in range(length))
            assert _snappy(pyarrow.compress(data, codec="snappy", asbytes=True)) == data
    for damaged in (b"\xff\xff\xff\x7f\x00", b"\x05\x01\x00", b"\x05\xff\xff", b"\x09\x00aA"):
        with pytest.raises((ValueError, IndexError)):
            _snappy(damaged)
