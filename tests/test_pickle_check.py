"""Pickles are read as Python reads them, or refused soon; none does anything."""

from __future__ import annotations

import collections
import io
import pickle
import resource
import time
import zipfile
from pathlib import Path

import pytest
import torch

from gpt2fast._system.pickle_check import Objection, Record, ordered_dict, unpickle
from gpt2fast.checkpoints.tensor_files import read_tensors, read_torch
from gpt2fast.errors import Error, WeightsError, shown

PLAIN = {
    "numbers": [0, 1, -1, 255, 65536, 2**40, -(2**40), 1.5, float("inf"), True, None],
    "texts": ["", "é", "x" * 300],
    "nested": {"a": [{"b": (1, (2, [3]))}], 7: "seven", 1.5: (), None: {}},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_what_python_reads(protocol):
    stream = io.BytesIO(pickle.dumps(PLAIN, protocol) + b"behind")
    assert unpickle(stream, {}) == PLAIN
    assert stream.read() == b"behind"


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_ordered_dict_is_a_dict(protocol):
    content = collections.OrderedDict(b=1, a=2)
    read = unpickle(
        io.BytesIO(pickle.dumps(content, protocol)), {"collections OrderedDict": ordered_dict}
    )
    assert list(read.items()) == [("b", 1), ("a", 2)]


def test_torch_files_are_what_torch_reads(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    content = {
        "views": [base.t(), base[1:3, ::2], base[:, 0], base[2, 3]],
        "dtypes": {str(d): torch.ones(3, dtype=d) for d in (torch.int64, torch.bool, torch.half)},
        "empty": torch.empty(0, 5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": (1, 2.5, "text", None, torch.float16, torch.Size([2, 3])),
    }
    path = tmp_path / "x.pt"
    for zipped in (True, False):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        read, expected = read_torch(path), torch.load(path, weights_only=True)
        assert read["plain"] == expected["plain"]
        for ours, theirs in zip(
            [*read["views"], *read["dtypes"].values(), read["empty"], read["parameter"]],
            [
                *expected["views"],
                *expected["dtypes"].values(),
                expected["empty"],
                expected["parameter"],
            ],
            strict=True,
        ):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        views = read["views"]
        assert len({view.untyped_storage().data_ptr() for view in views}) == 1  # still shared


def program(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


NUMBER = b"cnumpy\ndtype\n" + text("f8") + b"\x89\x88\x87R(K\x03%sNNNJ\xff\xff\xff\xffK\0tb"
BESIDE = {
    "a class as a function": b"c__builtin__\nlist\n)R",
    "an array's class": b"cnumpy\nndarray\n)R",
    "another encoding": b"c_codecs\nencode\n" + text("abc") + text("rot13") + b"\x86R",
    "no text": b"c_codecs\nencode\nK\x07" + text("latin1") + b"\x86R",
    "a set of a text": b"c__builtin__\nset\n" + text("abc") + b"\x85R",
    "a set's items after it": b"]q\0c__builtin__\nset\nh\0\x85R",
    "a short number": b"cnumpy.core.multiarray\nscalar\n"
    + NUMBER % text("<")
    + b"c_codecs\nencode\n"
    + text("abc")
    + text("latin1")
    + b"\x86R\x86R",
    "a big-endian number": b"cnumpy.core.multiarray\nscalar\n"
    + NUMBER % text(">")
    + b"c_codecs\nencode\n"
    + text("12345678")
    + text("latin1")
    + b"\x86R\x86R",
    "a type without its state": b"cnumpy\ndtype\n" + text("f8") + b"\x85Rq\0h\0\x86",
    "a state twice": b"cargparse\nNamespace\n)\x81}b}b",
    "a path with a state": b"cpathlib\nPosixPath\n" + text("x") + b"\x85R}b",
}


@pytest.mark.parametrize("content", BESIDE.values(), ids=BESIDE)
def test_what_lies_beside_tensors_is_not_made_otherwise_than_it_was(tmp_path, content):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program(content))
    with pytest.raises(WeightsError, match=r"x\.pt"):
        read_torch(path)


class Setter:
    def __reduce__(self):
        return (Path, (), {"exists": 7})


HOSTILE = {
    "a call": pickle.dumps(Setter()),
    "attributes of a class": program(b"cpathlib\nPosixPath\n}X\x04\0\0\0hashK\x01sb"),
    "attributes of a builtin": program(b"cbuiltins\ndict\n}X\x01\0\0\0aK\x01sb"),
    "nested tuples as a key": program(b"}", b")" + b"\x85" * 60_000 + b"Ns"),
    "tuples as keys": pickle.dumps({(i,): i for i in range(10)}, 2),
    "lists in lists": program(b"]" * 5000 + b"a" * 4999),
    "dicts in dicts": program(b"}" + b"K\0}" * 5000 + b"s" * 5000),
    "a list twice": program(b"](K\x01K\x02eq\0]h\0ah\0a"),
    "a list in a tuple, doubled": program(
        b"](" + b"N" * 200 + b"e\x85q\0" + b"](h\0h\0e\x85q\0" * 40
    ),
    "an integer of 2,000 bits": pickle.dumps([1 << 2000], 2),
    "text of 4 GB": program(b"X\xff\xff\xff\xff"),
    "a mark taken by a pop": program(b"N(\x85"),
    "an instruction of protocol 0": b"(dp0\nS'a'\np1\nI1\ns.",
    "a bytearray": pickle.dumps(bytearray(b"x" * 100), 5),
    "a set": pickle.dumps({1, 2}, 4),
    "1,000,000 steps": program(b"(" + b"N" * 1_000_000 + b"t"),
    "no end": b"\x80\x02]",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_other_pickles_are_refused_soon(content):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    known = {"collections OrderedDict": ordered_dict, "torch Size": tuple}
    with pytest.raises((Objection, ValueError, IndexError, KeyError, TypeError)):
        unpickle(io.BytesIO(content), known)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    assert Path("/").exists() is True and callable(Path("/").__hash__)


def test_what_stands_for_a_class_gets_no_attributes_but_its_state():
    content = pickle.dumps(_Described(), 4)
    name = f"{_Described.__module__} {_Described.__qualname__}"
    read = unpickle(io.BytesIO(content), {name: Record})
    assert type(read) is Record
    assert (read.arguments, read.state) == ((), {"size": 3})


class _Described:
    def __init__(self):
        self.size = 3


def archive(path: Path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)


def test_the_entry_that_is_checked_is_the_one_that_is_read(tmp_path):
    """torch's own reader ignores the case of names, and takes the first that fits."""
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as file:
        good = {name: file.read(name) for name in file.namelist()}
    hostile = pickle.dumps({"a": {(((),),): 1}}, 2)
    for name in ("x/Data.pkl", "x/DATA.PKL", "X/data.pkl.", "x/data.pkl/"):
        archive(path, {name: hostile, **good})
        tensors, _ = read_tensors(path)
        assert torch.equal(tensors["a"], torch.ones(2))
    archive(path, {"x/data/0": good["x/data/0"], "x/Data.pkl": good["x/data.pkl"]})
    with pytest.raises(WeightsError, match="x.pt"):
        read_tensors(path)
    archive(path, {**good, "y/data.pkl": hostile})
    with pytest.raises(WeightsError, match="x.pt"):
        read_tensors(path)


def test_the_same_bytes_are_not_many_tensors(tmp_path):
    path = tmp_path / "x.pt"
    weight = torch.ones(1 << 19)
    torch.save({"wte": weight, "lm_head": weight}, path)  # tied
    assert len(read_tensors(path)[0]) == 2
    torch.save({str(i): weight.view(1, -1) for i in range(1000)}, path)
    with pytest.raises(WeightsError, match="many tensors"):
        read_tensors(path)


def test_a_file_of_another_byte_order_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(2)}, path)
    path.write_bytes(path.read_bytes().replace(b"little", b"big   "))
    with pytest.raises(WeightsError, match="big-endian"):
        read_tensors(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_waited_for(instead, tmp_path, kind):
    path = instead(kind, tmp_path / "x.pt")
    with pytest.raises(WeightsError, match=f"a {kind}, not a file"):
        read_tensors(path)


def test_no_message_moves_the_cursor():
    name = "\x1b[2J\x1b]0;owned\x07\u202egnp.exe\x9b\udce9"
    message = str(Error(f"{name} is missing\nsecond line"))
    assert message.replace("\n", "").isprintable()
    assert message.count("\n") == 1 and "is missing" in message
    message.encode("utf-8")
    assert len(str(Error("x" * 100_000))) < 5000


@pytest.mark.parametrize(
    "value",
    ["\x1b[2J", "a" * 10**7, [[]] * 10**4, 10**5000, [10**5000]],
    ids=["escape", "long", "list", "integer", "integers"],
)
def test_a_value_is_shown_in_one_short_line(value):
    text = shown(value)
    assert text.isprintable() and 0 < len(text) <= 80
