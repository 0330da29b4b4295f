"""Broken and hostile pickles: one clear error each, and nothing in them is run."""

# ruff: noqa: F401, F811 (imported fixtures)

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from corrupted_files import STATE, folder, refused, saved
from gpt2fast import GPT2, Error

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
