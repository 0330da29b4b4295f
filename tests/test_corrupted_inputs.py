"""Broken and hostile files: one clear error each, soon, in little memory, and nothing is run."""

from __future__ import annotations

import faulthandler
import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2, Error, GPT2Config, Tokenizer
from gpt2fast.checkpoints.tensor_files import write_safetensors
from gpt2fast.tokenizer import BPETokenizer, CharTokenizer

SECONDS = 5
MEGABYTES = 300

CONFIG = GPT2Config(
    vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=16
)
torch.manual_seed(0)
MODEL = GPT2(CONFIG)
STATE = {name: tensor.detach() for name, tensor in MODEL.state_dict().items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    MODEL.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path, monkeypatch) -> Path:
    """A good checkpoint, the working directory of the test, to be damaged by it."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_refused(load: Callable[[], object], file: Path) -> str:
    """`load` raises one Error that names `file`, within bounds of time and memory."""
    faulthandler.dump_traceback_later(60, exit=True)  # a hang ends the run, and says where
    with suppress(OSError):  # Linux: forget the highest memory use so far
        Path("/proc/self/clear_refs").write_text("5")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()  # what other programs do meanwhile does not count
    try:
        with pytest.raises(Error) as caught:
            load()
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds = time.process_time() - start
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    message = str(caught.value)
    assert file.name in message
    assert len(message) < 2000
    assert seconds < SECONDS
    assert growth < MEGABYTES * 1024
    assert not os.path.exists("canary"), "the file's code was run"
    return message


def refused(path: Path, file: Path | None = None) -> str:
    return assert_refused(lambda: GPT2.from_pretrained(path), file or path)


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


# Pickles


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: object):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


CALLS = {
    "os.system": Runs(os.system, "touch canary"),
    "eval": Runs(eval, "open('canary', 'w')"),
    "exec": Runs(exec, "open('canary', 'w')"),
    "open": Runs(open, "canary", "w"),
    "getattr": Runs(getattr, "x", "upper"),
    "__import__": Runs(__import__, "antigravity"),
    "torch.load": Runs(torch.load, "canary"),
    "torch.save": Runs(torch.save, 1, "canary"),
    "bytearray of 10 GB": Runs(bytearray, 10**10),
    "a module": torch.nn.Linear(2, 2),
    "a path": Path("canary"),
    "a range": range(3),
    "bytes": b"weights",
}


def save(content: object, path: Path, form: str) -> None:
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_pickle_that_would_run_code(folder, call, form):
    path = folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    save({**STATE, "wte.weight": call}, path, form)
    refused(folder, path)


CONTENTS = {
    "None": None,
    "a number": 3,
    "text": "weights",
    "a list": list(STATE.values()),
    "a tensor": STATE["wte.weight"],
    "an empty dict": {},
    "a dict of numbers": {"wte.weight": 1, "wpe.weight": 2},
    "a dict of lists": {name: tensor.tolist() for name, tensor in STATE.items()},
    "keys that are numbers": dict(enumerate(STATE.values())),
    "keys that are tuples": {(name,): tensor for name, tensor in STATE.items()},
    "a dict of dicts": {"transformer": dict(enumerate(STATE.values()))},
    "a wrapped list": {"model": list(STATE.values())},
    "a sparse tensor": {**STATE, "wte.weight": torch.eye(17, 8).to_sparse()},
    "a tensor without data": {**STATE, "wte.weight": torch.ones(17, 8, device="meta")},
    "integers": {name: tensor.int() for name, tensor in STATE.items()},
    "complex numbers": {name: tensor.cfloat() for name, tensor in STATE.items()},
    "float8": {name: tensor.to(torch.float8_e4m3fn) for name, tensor in STATE.items()},
    "a repeated number": {**STATE, "wte.weight": torch.ones(1).expand(17, 8)},
    "scalars": {name: torch.tensor(1.0) for name in STATE},
}


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_a_pickle_that_is_no_state_dict(folder, content, form):
    path = folder / "weights.pt"
    save(content, path, form)
    refused(path)


def repack(
    path: Path, change: Callable[[str, bytes], bytes | None], compress: bool = False
) -> None:
    """Rewrite torch.save's archive, its entries changed; None leaves one out."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            changed = change(name, data)
            if changed is not None:
                archive.writestr(name, changed)


def with_program(path: Path, program: bytes, form: str) -> None:
    """A torch.save file whose pickle is `program`."""
    save({}, path, form)
    if form == "zip":
        repack(path, lambda name, data: program if name.endswith("data.pkl") else data)
    else:
        empty = pickle.dumps({}, 2)
        path.write_bytes(path.read_bytes().replace(empty, program, 1))


def tensor_program(numel: int, size: int, stride: int, key: str = "0") -> bytes:
    """{"wte.weight": a tensor of one axis over a storage of `numel` float32}."""

    def integer(value: int) -> bytes:
        return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    storage += integer(numel) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + integer(size) + b"\x85"
    tensor += integer(stride) + b"\x85\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + text("wte.weight") + tensor + b"s."


PROGRAMS = {
    "empty": b"",
    "garbage": bytes(range(256)),
    "no end": b"\x80\x02}",
    "an empty stack": b"\x80\x020.",
    "more than there is": b"\x80\x02RRR.",
    "an unset memory": b"\x80\x02h\x07.",
    "text of 4 GB": b"\x80\x02X\xff\xff\xff\xff.",
    "a global by stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch canary\x85R.",
    "an instance": b"(S'touch canary'\nios\nsystem\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "a storage by name": b"\x80\x02ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R.",
    "a codec": b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x03\0\0\0hex\x86R.",
    "a bytearray of 2 GB": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "a key of 100,000 tuples": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "a key of 2**60 objects": b"\x80\x02})" + b"q\x01h\x01\x86" * 60 + b"Ns.",
    "a value of 2**60 objects": b"\x80\x02]" + b"q\x01h\x01\x86" * 60 + b")R.",
    "lists that hold each other": b"\x80\x02](]q\x01]q\x02]q\x03h\x01h\x02h\x02eh\x03.",
    "lists 50,000 deep": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "5,000,000 steps": b"\x80\x02(" + b"N" * 5_000_000 + b"t.",
    "a persistent id that is text": b"\x80\x02X\x01\0\0\0aQ.",
    "a storage of 2**40": tensor_program(1 << 40, 136, 1),
    "a storage of 2**62": tensor_program(1 << 62, 136, 1),
    "a storage of -1": tensor_program(-1, 136, 1),
    "a tensor of 2**40": tensor_program(1, 1 << 40, 1),
    "a tensor of 2**62": tensor_program(1, 1 << 62, 1),
    "a tensor of 2**40 times one number": tensor_program(1, 1 << 40, 0),
    "a tensor of -5": tensor_program(1, -5, 1),
    "a stride of 2**60": tensor_program(1, 8, 1 << 60),
    "a negative stride": tensor_program(8, 8, -1),
    "a storage that is not there": tensor_program(1, 1, 1, key="99"),
    "a storage outside the archive": tensor_program(1, 1, 1, key="../../../etc/passwd"),
}


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_hostile_pickle(folder, program, form):
    path = folder / "weights.pt"
    with_program(path, program, form)
    refused(path)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("kept", [0, 1, 4, 30, 64, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, -22, -1])
def test_a_truncated_pickle(folder, kept, form):
    path = folder / "weights.pt"
    save(STATE, path, form)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(path)


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("seed", range(5))
def test_flipped_bits_in_a_pickle_end_in_a_model_or_an_error(folder, seed, form):
    path = folder / "weights.pt"
    save(STATE, path, form)
    content = path.read_bytes()
    bits = random.Random(seed)
    for _ in range(20):
        damaged = bytearray(content)
        damaged[bits.randrange(len(content))] ^= 1 << bits.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = GPT2.from_pretrained(path).state_dict()
        except Error as error:
            assert path.name in str(error)
        else:
            assert {name: t.shape for name, t in loaded.items()} == {
                name: t.shape for name, t in STATE.items()
            }


def test_archives_that_torch_save_does_not_write(folder):
    path = folder / "weights.pt"
    torch.save(STATE, path)
    repack(path, lambda name, data: data, compress=True)
    assert "compressed" in refused(path)

    torch.save(STATE, path)  # 200 MB of zeros in 200 kB
    repack(path, lambda name, data: data + bytes(200_000_000) * name.endswith("/data/0"), True)
    assert path.stat().st_size < 1e6
    refused(path)

    torch.save(STATE, path)
    repack(path, lambda name, data: None if name.endswith("data.pkl") else data)
    refused(path)

    torch.save(STATE, path)
    repack(path, lambda name, data: None if name.endswith("/data/0") else data)
    refused(path)

    torch.save(STATE, path)
    repack(path, lambda name, data: data[:-4] if name.endswith("/data/0") else data)
    refused(path)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    refused(path)

    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    refused(path)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "TorchScript" in refused(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", "2"),
        ("n_layer", 10**12),
        ("n_head", 3),
        ("n_embd", None),
        ("n_embd", [8]),
        ("block_size", -8),
        ("vocab_size", 17.0),
        ("dropout", "0.1"),
        ("dropout", 2),
        ("rotary", True),
        ("name", "gpt"),
    ],
)
def test_wrong_values_in_nanogpts_model_args(folder, field, value):
    arguments = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 8, "vocab_size": 17}
    path = folder / "ckpt.pt"
    (folder / "config.json").unlink()
    torch.save({"model": STATE, "model_args": arguments | {"bias": True}}, path)
    GPT2.from_pretrained(path)
    torch.save({"model": STATE, "model_args": arguments | {field: value}}, path)
    message = refused(path)
    assert field in message or "n_positions" in message or "pdrop" in message
    del arguments["n_head"]
    torch.save({"model": STATE, "model_args": arguments}, path)
    assert "n_head" in refused(path)


# Tokenizers


@pytest.fixture(scope="module")
def saved_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = "the cat sat on the mat, the end of the cat"
    BPETokenizer.train([text] * 3, vocab_size=280).save_pretrained(folder)
    return folder


def tokenizer_refused(folder: Path, file: Path) -> str:
    return assert_refused(lambda: Tokenizer.from_pretrained(folder), file)


@pytest.mark.parametrize("kept", [0, 1, 2, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, -1])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer_config.json"])
def test_a_truncated_tokenizer_file(tmp_path, saved_tokenizer, name, kept):
    shutil.copytree(saved_tokenizer, tmp_path, dirs_exist_ok=True)
    if name == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
    path = tmp_path / name
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    tokenizer_refused(tmp_path, path)


def change_vocab(model: dict, **changes: object) -> None:
    model["vocab"] = model["vocab"] | changes


TOKENIZER_CHANGES: dict[str, Callable[[dict], object]] = {
    "no model": lambda t: t.pop("model"),
    "model is a list": lambda t: t.update(model=[]),
    "another model": lambda t: t["model"].update(type="Unigram"),
    "no vocab": lambda t: t["model"].pop("vocab"),
    "an empty vocab": lambda t: t["model"].update(vocab={}),
    "vocab is a list": lambda t: t["model"].update(vocab=["a"]),
    "an id that is text": lambda t: change_vocab(t["model"], the="7"),
    "an id that is true": lambda t: change_vocab(t["model"], the=True),
    "a negative id": lambda t: change_vocab(t["model"], the=-1),
    "a huge id": lambda t: change_vocab(t["model"], the=1 << 60),
    "an id twice": lambda t: change_vocab(t["model"], the=t["model"]["vocab"]["at"]),
    "a surrogate": lambda t: change_vocab(t["model"], **{"\ud800": 279}),
    "no merges": lambda t: t["model"].pop("merges"),
    "merges is an object": lambda t: t["model"].update(merges={"a": "t"}),
    "a merge of unknown tokens": lambda t: t["model"]["merges"].append(["qq", "zz"]),
    "a merge into an unknown token": lambda t: t["model"]["merges"].append(["q", "z"]),
    "a merge of three": lambda t: t["model"]["merges"].append(["a", "t", "e"]),
    "a merge of one": lambda t: t["model"]["merges"].append("at"),
    "a merge of numbers": lambda t: t["model"]["merges"].append([1, 2]),
    "a merge that is null": lambda t: t["model"]["merges"].append(None),
    "added_tokens is an object": lambda t: t.update(added_tokens={}),
    "an added token of text": lambda t: t["added_tokens"].append("<pad>"),
    "an added token without text": lambda t: t["added_tokens"].append({"id": 300}),
    "an added token with another's id": lambda t: t["added_tokens"].append(
        {"id": 3, "content": "<pad>"}
    ),
    "an added token far away": lambda t: t["added_tokens"].append(
        {"id": 1 << 40, "content": "<pad>"}
    ),
    "an unknown pre_tokenizer": lambda t: t["pre_tokenizer"].update(type="Whites"),
    "pre_tokenizer is a number": lambda t: t.update(pre_tokenizer=1),
    "an unknown decoder": lambda t: t["decoder"].update(type="Words"),
    "a normalizer without its pattern": lambda t: t.update(normalizer={"type": "Replace"}),
}


@pytest.mark.parametrize("change", TOKENIZER_CHANGES.values(), ids=TOKENIZER_CHANGES)
def test_a_broken_tokenizer_json(tmp_path, saved_tokenizer, change):
    shutil.copytree(saved_tokenizer, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content))
    tokenizer_refused(tmp_path, path)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"[" * 1_000_000, b'{"a":' * 500_000, b"[]", b"<html>404</html>", b"q z"],
)
def test_a_tokenizer_file_that_is_something_else(tmp_path, saved_tokenizer, name, content):
    shutil.copytree(saved_tokenizer, tmp_path, dirs_exist_ok=True)
    if name != "tokenizer.json":
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_bytes(content)
    tokenizer_refused(tmp_path, tmp_path / name)


@pytest.mark.parametrize(
    "vocab",
    [{}, [], {"a": "0"}, {"a": 1}, {"a": 0, "b": 0}, {"ab": 0}, {"": 0}, {"a": -1}, {"a": 1 << 60}],
)
def test_a_broken_vocabulary_of_characters(tmp_path, vocab):
    CharTokenizer.train(["abc"]).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    tokenizer_refused(tmp_path, tmp_path / "vocab.json")
