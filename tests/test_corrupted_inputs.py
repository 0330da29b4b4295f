"""Broken and hostile files: one clear error each, soon, in little memory, and nothing is run."""

# ruff: noqa: F401, F811 (imported fixtures)

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path

import pytest
import torch

from corrupted_files import CONFIG, STATE, folder, refused, saved
from gpt2fast import GPT2, Error, GPT2Config
from gpt2fast.checkpoints.tensor_files import write_safetensors


def parts(path: Path) -> tuple[bytes, bytes]:
    """JSON header and tensor data of a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


# safetensors


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 64, 200, 0.2, 0.4, 0.5, 0.6, 0.8, 0.95, -64, -1])
def test_a_truncated_safetensors_file(folder, kept):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(folder, path)


@pytest.mark.parametrize("bit", range(0, 64, 3))
def test_a_flipped_bit_in_the_header_length(folder, bit):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    refused(folder, path)


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_the_header_never_gives_other_weights(folder, seed):
    path = folder / "model.safetensors"
    header, data = parts(path)
    bits = random.Random(seed)
    for _ in range(10):
        damaged = bytearray(header)
        damaged[bits.randrange(len(header))] ^= 1 << bits.randrange(8)
        path.write_bytes(safetensors(bytes(damaged), data))
        try:
            loaded = GPT2.from_pretrained(folder)
        except Error as error:
            assert path.name in str(error)
        else:  # a bit of the metadata, or "." became "/"
            assert all(torch.equal(t, STATE[name]) for name, t in loaded.state_dict().items())


def test_a_flipped_bit_in_the_data_is_another_number(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x80  # a sign
    path.write_bytes(content)
    loaded = GPT2.from_pretrained(folder).state_dict()
    changed = [name for name, tensor in loaded.items() if not torch.equal(tensor, STATE[name])]
    assert len(changed) == 1
    assert (loaded[changed[0]] != STATE[changed[0]]).sum() == 1


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "header beyond 2**63": safetensors({}, length=1 << 63),
    "header of 2**64 - 1": safetensors({}, length=(1 << 64) - 1),
    "header longer than the file": safetensors({"a": entry()}, bytes(8), length=1000),
    "header of 9 MB": safetensors(b" " * (9 << 20)),
    "no tensors": safetensors({}),
    "not JSON": safetensors(b"weights!", bytes(8)),
    "not UTF-8": safetensors(b'{"\xff\xfe": 1}'),
    "a list": safetensors([1, 2, 3]),
    "lists 100,000 deep": safetensors(b"[" * 100_000),
    "objects 100,000 deep": safetensors(b'{"a":' * 100_000),
    "entry is a number": safetensors({"a": 1}, bytes(8)),
    "entry without offsets": safetensors({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "unknown dtype": safetensors({"a": entry("F99")}, bytes(8)),
    "dtype is a number": safetensors({"a": entry(32)}, bytes(8)),
    "another dtype's size": safetensors({"a": entry("F64")}, bytes(8)),
    "shape of 2**40": safetensors({"a": entry(shape=[1 << 40])}, bytes(8)),
    "shape that overflows": safetensors({"a": entry(shape=[1 << 62, 1 << 62])}, bytes(8)),
    "shape and offsets of 2**40": safetensors(
        {"a": entry(shape=[1 << 38], offsets=[0, 1 << 40])}, bytes(8)
    ),
    "negative shape": safetensors({"a": entry(shape=[-2])}, bytes(8)),
    "fractional shape": safetensors({"a": entry(shape=[2.5])}, bytes(8)),
    "shape is text": safetensors({"a": entry(shape="2")}, bytes(8)),
    "offsets beyond the end": safetensors({"a": entry(offsets=[8, 16])}, bytes(8)),
    "offsets backwards": safetensors({"a": entry(offsets=[8, 0])}, bytes(8)),
    "negative offsets": safetensors({"a": entry(offsets=[-8, 0])}, bytes(8)),
    "tensors that overlap": safetensors({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "one tensor twice": safetensors({"a": entry(), "b": entry()}, bytes(8)),
    "a gap": safetensors({"a": entry(), "b": entry(offsets=[16, 24])}, bytes(24)),
    "data that belong to nothing": safetensors({"a": entry()}, bytes(16)),
    "100,000 empty tensors": safetensors(
        {f"t{i}": entry(shape=[0], offsets=[0, 0]) for i in range(100_000)}
    ),
    "a long name": safetensors({"x" * 1_000_000: entry()}, bytes(8)),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "a web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_safetensors_file_with_a_bad_header(folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    refused(folder, path)
    refused(path)


def test_weights_that_are_no_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder)
    os.mkfifo(folder / "weights.pt")  # opening it would wait for ever
    refused(folder / "weights.pt")


# config.json

SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
WRONG_SIZES: list[object] = ["12", -1, 0, True, 1.5, 8.0, [8], {"n": 8}, 10**12, 1 << 70]
NUMBERS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range")
WRONG_NUMBERS: list[object] = ["0.1", -1, None, True, [0.1], float("nan"), float("inf")]
FLAGS = (
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
)
WRONG_FLAGS: list[object] = ["true", 1, None, []]
WRONG_VALUES: dict[str, list[object]] = {
    **{field: [*WRONG_SIZES, None] for field in SIZES[:-1]},
    "n_inner": WRONG_SIZES,
    **{field: WRONG_NUMBERS for field in NUMBERS},
    **{field: WRONG_FLAGS for field in FLAGS},
    "activation_function": ["swish2", "", 3, None, ["gelu"], {}],
    "bos_token_id": ["x", 1.5, True, {}],
    "eos_token_id": ["x", 1.5, True, {}],
    "model_type": ["llama", "", 3, None, ["gpt2"]],
    "dtype": ["int8", "float", 32, ["float32"]],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in WRONG_VALUES.items() for value in values],
)
def test_a_wrong_value_in_config_json_is_named(folder, field, value):
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG.to_dict() | {field: value}))
    assert field in refused(folder, path)


CONFIGS = {
    "empty": b"",
    "truncated": json.dumps(CONFIG.to_dict()).encode()[:-5],
    "not JSON": b"n_layer: 12",
    "not UTF-8": b'{"model_type": "\xff"}',
    "UTF-16": '{"model_type": "gpt2"}'.encode("utf-16"),
    "a list": b"[]",
    "a string": b'"gpt2"',
    "null": b"null",
    "lists 1,000,000 deep": b"[" * 1_000_000,
    "closed lists 100,000 deep": b"[" * 100_000 + b"]" * 100_000,
    "a value 900 deep": b'{"n_layer":' + b"[" * 900 + b"]" * 900 + b"}",
    "a number of 10,000 digits": b'{"n_layer": ' + b"9" * 10_000 + b"}",
    "9 MB": b" " * (9 << 20) + b"{}",
}


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_a_config_json_that_is_none(folder, content):
    path = folder / "config.json"
    path.write_bytes(content)
    refused(folder, path)


def test_a_missing_config_json_names_the_weights_that_nothing_describes(folder):
    (folder / "config.json").unlink()
    assert "config.json" in refused(folder, folder / "model.safetensors")


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_embd": 1 << 24},
        {"n_layer": 1 << 12},
        {"vocab_size": 1 << 24, "n_positions": 1 << 24},
        {"n_embd": 1 << 24, "n_layer": 1 << 12, "n_inner": 1 << 24, "vocab_size": 1 << 24},
    ],
)
def test_a_huge_model_in_config_json_is_not_built(folder, sizes):
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict() | sizes))
    refused(folder, folder / "model.safetensors")


def test_huge_sizes_that_config_and_weights_agree_on_allocate_nothing(folder):
    # Legal in each file, 10**14 bytes in all: the tensors' bytes are missing, or repeated.
    width = 1 << 22
    config = CONFIG.to_dict() | {"n_embd": width}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = GPT2Config.from_dict(config).parameter_shapes()
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = entry(shape=shape, offsets=[begin, end])
    path = folder / "model.safetensors"
    path.write_bytes(safetensors(header, bytes(1000)))
    refused(folder, path)
    path.unlink()
    repeated = folder / "pytorch_model.bin"
    torch.save({name: torch.ones(1).expand(shape) for name, shape in shapes.items()}, repeated)
    refused(folder, repeated)


# Shards

SHARD = "model-00001-of-00001.safetensors"
INDEXES = {
    "not JSON": "{",
    "a list": "[]",
    "no weight_map": "{}",
    "weight_map is a list": '{"weight_map": ["wte.weight"]}',
    "an empty weight_map": '{"weight_map": {}}',
    "a file that is a number": '{"weight_map": {"wte.weight": 7}}',
    "a file that is null": '{"weight_map": {"wte.weight": null}}',
    "a file without a name": '{"weight_map": {"wte.weight": ""}}',
    "a missing file": '{"weight_map": {"wte.weight": "model-7.safetensors"}}',
    "a path outside": json.dumps({"weight_map": {"wte.weight": f"../../{SHARD}"}}),
    "a path inside": json.dumps({"weight_map": {"wte.weight": f"./{SHARD}"}}),
    "an absolute path": '{"weight_map": {"wte.weight": "/etc/passwd"}}',
    "the folder above": '{"weight_map": {"wte.weight": ".."}}',
    "a name with a NUL": json.dumps({"weight_map": {"wte.weight": "model\0.safetensors"}}),
    "itself": '{"weight_map": {"wte.weight": "model.safetensors.index.json"}}',
    "a tensor that is not there": json.dumps({"weight_map": {"nowhere": SHARD}}),
    "an unknown file type": '{"weight_map": {"wte.weight": "config.json"}}',
    "1,000 missing files": json.dumps({"weight_map": {f"t{i}": f"{i}.bin" for i in range(1000)}}),
}


@pytest.mark.parametrize("content", INDEXES.values(), ids=INDEXES)
def test_a_bad_index_of_shards(folder, content):
    (folder / "model.safetensors").rename(folder / SHARD)
    path = folder / "model.safetensors.index.json"
    path.write_text(content)
    unknown = folder / "config.json"
    refused(folder, unknown if unknown.name in content else path)


def test_a_tensor_in_two_shards_and_a_truncated_shard(folder):
    (folder / "model.safetensors").rename(folder / SHARD)
    second = folder / "model-2.safetensors"
    write_safetensors(second, {"transformer.wte.weight": STATE["wte.weight"]})
    path = folder / "model.safetensors.index.json"
    weight_map = {f"transformer.{name}": SHARD for name in STATE}
    path.write_text(
        json.dumps({"weight_map": weight_map | {"transformer.wte.weight": second.name}})
    )
    refused(folder, path)
    path.write_text(json.dumps({"weight_map": weight_map}))
    GPT2.from_pretrained(folder)
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-9])
    refused(folder, folder / SHARD)
