"""Published attacks on programs that load models, and why they find nothing here.

Each was somebody's real vulnerability: in transformers, PyTorch, safetensors' and GGUF's readers,
PyTorch Lightning, Keras and their kin. docs/security.md says what is promised.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2fast import GPT2, Error, GPT2Config, Tokenizer
from gpt2fast._system.pickle_check import Objection
from gpt2fast.checkpoints.run_folder import OLD_STATE
from gpt2fast.checkpoints.tensor_files import read_tensors
from gpt2fast.checkpoints.torch_files import _Storage, _Tensors
from gpt2fast.data.tokens import MAGIC, TokenFile
from gpt2fast.errors import DataError, TokenizerError, WeightsError
from gpt2fast.tokenizer import CharTokenizer
from gpt2fast.training.checkpoints.position import Position
from gpt2fast.training.checkpoints.state import load_state

CONFIG = GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2, dropout=0.0)
EVIL = "import pathlib; pathlib.Path('canary').touch()\n"


class Runs:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


TOUCH = Runs(os.system, "touch canary")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """A good checkpoint and the working directory; code and connections would be noticed."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    GPT2(CONFIG).save_pretrained(tmp_path, tokenizer=CharTokenizer.train(["abcdefghijklmnop"]))

    def connect(*_: object) -> None:
        raise AssertionError("a file made it open a connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    before = set(sys.modules)
    yield tmp_path
    assert not Path("canary").exists(), "the file's code was run"
    assert not {name for name in set(sys.modules) - before if "evil" in name}


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in GPT2.from_pretrained(folder).state_dict().items()}


def safetensors(path: Path, header: object, data: bytes = b"") -> None:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


# 1. A configuration names code: auto_map, or the private field of the attention's implementation.
def test_code_that_a_configuration_names_is_not_loaded(folder):
    (folder / "evil.py").write_text(EVIL)
    named = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": "evil.T"}
    fields = {
        "auto_map": named,
        "trust_remote_code": True,
        "_attn_implementation": "someone/evil",
        "_attn_implementation_internal": "someone/evil:kernel",
        "attn_implementation": "someone/evil",
        "custom_pipelines": {"text-generation": {"impl": "evil.P"}},
        "_name_or_path": "someone/evil",
        "use_kernels": True,
        "quantization_config": None,
    }
    change(folder / "config.json", **fields)
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.T", "evil.T"]},
        chat_template="{{ cycler.__init__.__globals__.os.system('touch canary') }}",
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"custom_generate": "evil", **fields})
    )
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL)
    model = GPT2.from_pretrained(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode("abc")])
    assert model.generate(ids, max_new_tokens=2).shape == (1, 5)
    assert type(model) is GPT2 and type(tokenizer) is CharTokenizer


# 2. A configuration overrides what the caller asked for.
def test_a_configuration_does_not_override_the_caller(folder):
    change(
        folder / "config.json",
        dtype="float16",
        torch_dtype="float16",
        local_files_only=False,
        revision="evil",
        device="meta",
        max_length=10**9,
        name_or_path="someone/evil",
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"max_new_tokens": 10**9, "max_length": 10**9, "use_cache": False})
    )
    model = GPT2.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.generate(torch.zeros(1, 2, dtype=torch.long), max_new_tokens=1).shape == (1, 3)


# 3. weights_only is passed by: torch's tar format (CVE-2025-32434), BUILD, what it allows.
def test_no_weights_file_reaches_torchs_or_pythons_unpickler(folder, monkeypatch):
    state = state_of(folder)
    (folder / "model.safetensors").unlink()
    weights = folder / "pytorch_model.bin"

    def never(*_: object, **__: object) -> None:
        raise AssertionError("an unpickler that makes objects was used")

    torch.save(state, weights)
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(pickle, "Unpickler", never)
    assert torch.equal(GPT2.from_pretrained(folder).wte.weight, state["wte.weight"])

    with tarfile.open(weights, "w") as archive:
        for name in ("pickle", "storages", "tensors"):
            content = pickle.dumps(TOUCH)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(WeightsError):
        GPT2.from_pretrained(folder)
    build = b"\x80\x02cpathlib\nPath\n}(X\x08\x00\x00\x00read_bytcos\nsystem\nub."
    for program in (build, pickle.dumps(TOUCH), pickle.dumps({**state, "x": TOUCH}, 2)):
        for form in (True, False):
            torch.save({"x": 1}, weights, _use_new_zipfile_serialization=form)
            if form:
                replace_entry(weights, "data.pkl", program)
            else:
                weights.write_bytes(weights.read_bytes()[:15] + program * 5)
            with pytest.raises(WeightsError):
                GPT2.from_pretrained(folder)


def replace_entry(path: Path, ending: str, content: bytes, **how: Any) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, before in entries.items():
            archive.writestr(name, content if name.endswith(ending) else before)


# 4. The random state of a resumed run is a pickle that anything may be in.
@pytest.mark.parametrize(
    "states",
    [
        TOUCH,
        [TOUCH],
        [{"python": TOUCH, "torch": torch.zeros(5056, dtype=torch.uint8), "cuda": []}],
        [{"python": random.Random(0), "torch": torch.get_rng_state(), "cuda": []}],
    ],
    ids=["a call", "a list", "within", "an object"],
)
def test_a_random_state_is_numbers(folder, states):
    torch.save({"format": 2, "random": states}, folder / OLD_STATE)
    with pytest.raises(WeightsError, match="could run code|changes the attributes|instruction"):
        load_state(folder)


# 5. What safe loading refuses is loaded unsafely in a second try, or another file in its place.
def test_nothing_is_tried_again_in_an_unsafe_way(folder):
    shutil.copy(folder / "model.safetensors", "good")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(TOUCH))
    for content in (b"", Path("good").read_bytes()[:200], pickle.dumps(TOUCH), b"\x00" * 100):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(WeightsError, match="model.safetensors"):
            GPT2.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="pytorch_model.bin") as caught:
        GPT2.from_pretrained(folder)
    assert "weights_only" not in str(caught.value)


# 6. Sizes beyond the file's end.
def test_sizes_are_those_of_the_file(folder):
    path = folder / "model.safetensors"
    header = {"x": {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 1 << 22]}}
    safetensors(path, header, bytes(64))
    with pytest.raises(WeightsError):
        read_tensors(path)
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(WeightsError, match="only its beginning"):
        read_tensors(path)
    weights = folder / "x.bin"
    torch.save({"x": torch.zeros(1000)}, weights)
    with zipfile.ZipFile(weights) as archive:
        (program,) = (archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))
    assert program.count(b"M\xe8\x03") == 2  # 1000 numbers in the storage, 1000 in the tensor
    replace_entry(weights, "data.pkl", program.replace(b"M\xe8\x03", b"M\xff\xff"))
    with pytest.raises(WeightsError, match="storage"):
        read_tensors(weights)


# 7. A header of a hundred thousand entries.
def test_a_header_of_100_000_tensors_is_refused_soon(folder):
    path = folder / "model.safetensors"
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    safetensors(path, {f"t{i}": entry for i in range(100_000)})
    start = time.process_time()
    with pytest.raises(WeightsError, match="100000 tensors|limit"):
        read_tensors(path)
    assert time.process_time() - start < 5


# 8. Shapes whose product overflows.
@pytest.mark.parametrize(
    "shape", [[1 << 32, 1 << 32], [1 << 62, 4], [(1 << 63) - 1, 2], [1 << 64], [-1, -1], [-4]]
)
def test_shapes_whose_product_overflows(folder, shape):
    path = folder / "model.safetensors"
    safetensors(path, {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}, bytes(4))
    with pytest.raises(WeightsError):
        read_tensors(path)
    with pytest.raises(Objection):  # the same in a pickle
        _Tensors(64).tensor(_Storage(torch.zeros(1)), 0, tuple(shape), tuple(1 for _ in shape))


# 9. An index leads out of its folder, by names or by links.
def test_an_index_leads_nowhere_else(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.safetensors"
    (folder / "model.safetensors").rename(outside)
    index = folder / "model.safetensors.index.json"
    relative = os.path.relpath(outside, folder)
    for name in (str(outside), relative, f"./{relative}", "..", ".", "a/../b", "x\0y", ""):
        index.write_text(json.dumps({"weight_map": {"wte.weight": name}}))
        with pytest.raises(WeightsError, match="is no file name"):
            GPT2.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": {"wte.weight": "shard.safetensors"}}))
    shard = folder / "shard.safetensors"
    for target in ("/dev/zero", "/etc/passwd", "/proc/self/environ", "nowhere"):
        shard.symlink_to(target)
        with pytest.raises(WeightsError) as caught:
            GPT2.from_pretrained(folder)
        assert "root:" not in str(caught.value) and "PATH=" not in str(caught.value)
        shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(WeightsError):
        GPT2.from_pretrained(folder)


# 10. Counts that are huge or negative.
@pytest.mark.parametrize("count", [-1, -(1 << 31), (1 << 31) - 1, 1 << 30, 5])
def test_counts_of_tokens_are_those_of_the_file(folder, count):
    path = folder / "train.bin"
    path.write_bytes(struct.pack("<3i", MAGIC, 1, count) + bytes(1012) + bytes(8))
    with pytest.raises(DataError, match="header tells of"):
        TokenFile(path, None)


@pytest.mark.parametrize("value", [-1, 0, 1 << 40, 1 << 70, 10**400])
@pytest.mark.parametrize("name", ["n_layer", "n_embd", "vocab_size", "n_positions", "n_inner"])
def test_sizes_of_a_configuration_are_bounded(folder, name, value):
    change(folder / "config.json", **{name: value})
    with pytest.raises(Error, match="config.json"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [{"step": -5}, {"tokens": 1 << 70}, {"batches": 1.5}, {"step": True}, {"elapsed": "1"},
     {"order": 3}, {"val_loss": [1]}, {"nothing": 1}],
)  # fmt: skip
def test_a_position_is_one_that_a_run_reaches(change):
    saved = vars(Position(step=3, tokens=64, val_loss=2.5, elapsed=1))
    assert Position.of(saved) == Position(step=3, tokens=64, val_loss=2.5, elapsed=1)
    with pytest.raises((TypeError, ValueError), match=next(iter(change))):
        Position.of({**saved, **change})


# 11. Regular expressions in a tokenizer's steps.
def with_pattern(pattern: str) -> dict[str, object]:
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
    }


@pytest.mark.parametrize(
    "pattern",
    ["(", "[z-a]", "(?<n>a", "a{99999999999}", "\\", "(?P<x>", "*", "(?" + "(" * 5000],
)
def test_malformed_patterns(folder, pattern):
    for name in ("vocab.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "tokenizer.json").write_text(json.dumps(with_pattern(pattern)))
    with pytest.raises(TokenizerError, match="tokenizer.json"):
        Tokenizer.from_pretrained(folder)


def test_a_pattern_that_backtracks_for_ever_ends_in_an_error(folder, capfd):
    for name in ("vocab.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "tokenizer.json").write_text(json.dumps(with_pattern("(a+)+$")))
    tokenizer = Tokenizer.from_pretrained(folder)
    start = time.process_time()
    with pytest.raises(TokenizerError, match="the text cannot be encoded: .*retry-limit"):
        tokenizer.encode("a" * 2000 + "!")
    assert time.process_time() - start < 20


# 12. Entries of a zip file that only their case tells apart: one is checked, the other one read.
@pytest.mark.parametrize("other", ["Data.pkl", "DATA.PKL", "data.PKL"])
def test_entries_are_told_apart_as_they_are_read(folder, other):
    state = state_of(folder)
    (folder / "model.safetensors").unlink()
    weights = folder / "pytorch_model.bin"
    torch.save(state, weights)
    evil = pickle.dumps(TOUCH)
    with zipfile.ZipFile(weights) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    for place in (0, len(entries)):
        root = entries[0][0].split("/")[0]
        mixed = [*entries[:place], (f"{root}/{other}", evil), *entries[place:]]
        with zipfile.ZipFile(weights, "w") as archive:
            for name, content in mixed:
                archive.writestr(name, content)
        loaded = GPT2.from_pretrained(folder).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


# 13. An archive unpacks to a thousand times its size.
@pytest.mark.parametrize("how", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("ending", ["data.pkl", "data/0"])
def test_a_packed_archive_is_not_unpacked(folder, how, ending):
    (folder / "model.safetensors").unlink()
    weights = folder / "pytorch_model.bin"
    torch.save({"wte.weight": torch.zeros(17, 8)}, weights)
    replace_entry(weights, ending, bytes(1 << 26), compression=how)
    assert weights.stat().st_size < 1 << 17
    with pytest.raises(WeightsError, match="compressed archive"):
        GPT2.from_pretrained(folder)
