"""torch.save's files, read without torch.load: its archives, and its format from before 1.6.

An archive is a zip file, uncompressed: `<name>/data.pkl` describes the tensors, and
`<name>/data/<key>` holds the bytes of each storage. The older format is five pickles and then the
storages, one after the other. The pickle is read by `pickle_check`, and every tensor lies within
a storage that the file has, or the file is refused.

Storages of an archive are memory-mapped, private and copy-on-write.
https://docs.pytorch.org/docs/stable/notes/serialization.html#serialized-file-format-for-torch-save
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from typing import IO, Any

import torch
from torch import Tensor

from .._system.pickle_check import MOST_STEPS, Objection, Record, ordered_dict, record, unpickle
from ..errors import shown

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

_LARGEST_DIRECTORY = 8 << 20  # of a zip file; gpt2-xl's has 60 kB
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_LOCAL = struct.Struct("<4s5H3L2H")
_LARGEST_SIZE = 1 << 40
# Tied weights are there twice, and a checkpoint may hold further copies (an average, say).
_MOST_COPIES = 4
_SMALL = 1 << 20

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_NumPyType = record("dtype", has_state=True)
_DTYPES = {*_STORAGES.values(), torch.float8_e4m3fn, torch.float8_e5m2}


def read_torch_file(file: IO[bytes]) -> Any:
    """The content of an opened file: tensors, numbers and texts in dicts, lists and tuples.

    An OrderedDict is a dict, a Parameter a tensor, a device its name, a set a tuple, a number of
    NumPy's one of Python's; an array of NumPy's, a Namespace or a path is a `Record`.

    Raises:
        Objection: the file is not one of those that are read.
        Exception: of any kind, where it is damaged.
    """
    head = file.read(len(LEGACY_MAGIC))
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if head.startswith(ZIP_MAGIC):
        return _Archive(file, size).read()
    if head == LEGACY_MAGIC:
        return _Legacy(file, size).read()
    raise Objection("was not written by torch.save")


class _Storage:
    """A row of numbers in the file. `numbers` may be filled after tensors were made of it."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers


class _Tensors:
    """Makes the tensors that a pickle describes out of storages."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.claimed = 0
        self.storages: dict[str, _Storage] = {}
        self.known: dict[str, Any] = {
            "collections OrderedDict": ordered_dict,
            **_BESIDE,
            "torch Size": _size,
            "torch device": _device,
            "torch.nn.parameter Parameter": None,
            "torch._utils _rebuild_parameter": _parameter,
            "torch._utils _rebuild_tensor": self.tensor,
            "torch._utils _rebuild_tensor_v2": self.tensor_v2,
        }
        for name, dtype in _STORAGES.items():
            self.known[f"torch {name}"] = self.known[f"torch.cuda {name}"] = dtype
        for dtype in _DTYPES:
            self.known[str(dtype).replace(".", " ")] = dtype

    def unpickle(self, stream: IO[bytes]) -> Any:
        return unpickle(stream, self.known, self.storage, MOST_STEPS)

    def storage(self, id: Any) -> _Storage:
        """The storage with the id ("storage", type, key, device, numbers[, part])."""
        kind, dtype, key, _, count, *part = id
        if kind != "storage" or type(key) is not str or not isinstance(dtype, torch.dtype):
            raise Objection(f"refers to {shown(id)}, which is no storage")
        if type(count) is not int or not 0 <= count * dtype.itemsize <= self.size:
            raise Objection(f"has a storage of {shown(count)} numbers, more than the file holds")
        if key not in self.storages:
            self.storages[key] = _Storage(self.numbers(key, dtype, count))
        found = self.storages[key]
        if found.numbers.dtype != dtype or len(found.numbers) != count:
            raise Objection(f"tells of the storage {shown(key)} in two ways")
        if part and part[0] is not None:
            _, offset, length = part[0]
            if not (_is_size(offset) and _is_size(length)) or offset + length > count:
                raise Objection("has a part of a storage that is not in it")
            return _Storage(found.numbers[offset : offset + length])
        return found

    def numbers(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """The storage as a tensor of one axis."""
        raise NotImplementedError

    def tensor_v2(
        self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any
    ) -> Tensor:  # gradient, hooks, metadata
        return self.tensor(storage, offset, size, stride)

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor:
        if not isinstance(storage, _Storage) or not (
            _is_size(offset) and _are_sizes(size) and _are_sizes(stride)
        ):
            raise Objection("describes a tensor that cannot be")
        if len(size) != len(stride) or len(size) > 64:
            raise Objection(f"describes a tensor of {len(size)} axes and {len(stride)} strides")
        numbers = storage.numbers
        count, last = 1, offset
        for length, step in zip(size, stride, strict=True):
            count *= length
            last += (length - 1) * step
        if count and (last >= len(numbers) or count > len(numbers)):
            # Tensors may be views (transposed, sliced), but not repeat a few bytes many times.
            raise Objection(
                f"has a tensor of shape {shown(tuple(size))}, which claims other bytes than the "
                "file holds"
            )
        self.claimed += count * numbers.dtype.itemsize
        if self.claimed > _MOST_COPIES * self.size + _SMALL:
            raise Objection("uses the same bytes for many tensors")
        if not count:
            return torch.empty(size, dtype=numbers.dtype)
        return numbers.as_strided(size, stride, numbers.storage_offset() + offset)


class _Archive(_Tensors):
    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__(size)
        _check_directory(file, size)
        self.file = file
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        # By the names as they are: no reader that ignores their case has a say.
        self.entries = {entry.filename: entry for entry in entries}
        if len(self.entries) != len(entries):
            raise Objection("has two entries of one name")
        if any(name.endswith("/constants.pkl") for name in self.entries):
            raise Objection(
                "is a TorchScript program, not a state dict: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt') makes one of it"
            )
        # Compressed entries would be mapped as they are, or unpack to any size.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise Objection("is a compressed archive, which torch.save does not write")
        if any(entry.flag_bits & 1 or entry.compress_size != entry.file_size for entry in entries):
            raise Objection("has an encrypted entry")
        if sum(entry.file_size for entry in entries) > size:
            raise Objection("has entries that overlap")
        described = [name for name in self.entries if name.endswith("/data.pkl")]
        if len(described) != 1:
            raise Objection("is a zip archive, but not one that torch.save wrote")
        self.root = described[0].removesuffix("data.pkl")
        # Kept open by the tensors that lie in it; changes stay in this process.
        self.map: Any = None
        if isinstance(file, io.BytesIO):
            self.map = bytearray(file.getbuffer())
        else:
            self.map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)

    def read(self) -> Any:
        order = f"{self.root}byteorder"
        if order in self.entries and self.content(order) != b"little":
            raise Objection("holds numbers of a big-endian machine")
        return self.unpickle(io.BytesIO(self.content(f"{self.root}data.pkl")))

    def content(self, name: str) -> bytes:
        start = self.start(name)
        return bytes(memoryview(self.map)[start : start + self.entries[name].file_size])

    def start(self, name: str) -> int:
        """The place of an entry's first byte, as the header before it says."""
        entry = self.entries[name]
        header = bytes(memoryview(self.map)[entry.header_offset :][: _LOCAL.size])
        if len(header) < _LOCAL.size or not header.startswith(ZIP_MAGIC):
            raise Objection("has an entry without a header")
        *_, name_length, extra_length = _LOCAL.unpack(header)
        start = entry.header_offset + _LOCAL.size + name_length + extra_length
        if start + entry.file_size > self.size:
            raise Objection("has an entry that is longer than the file")
        return start

    def numbers(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        name = f"{self.root}data/{key}"
        if name not in self.entries:
            raise Objection(f"has a tensor in the storage {shown(key)}, which is not there")
        length = self.entries[name].file_size
        if length != count * dtype.itemsize:
            raise Objection(
                f"says that the storage {shown(key)} has {count * dtype.itemsize} bytes, "
                f"and holds {length}"
            )
        if not count:
            return torch.empty(0, dtype=dtype)
        start = self.start(name)
        numbers = torch.frombuffer(self.map, dtype=torch.uint8, count=length, offset=start)
        if numbers.data_ptr() % dtype.itemsize:
            numbers = numbers.clone()
        return numbers.view(dtype)


class _Legacy(_Tensors):
    """Its storages follow the pickles, so their bytes come last."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        super().__init__(size)
        self.file = file
        self.allocated = 0

    def read(self) -> Any:
        self.file.seek(len(LEGACY_MAGIC))
        self.unpickle(self.file)  # the protocol, 1001
        system = self.unpickle(self.file)
        if type(system) is not dict or system.get("little_endian") is not True:
            raise Objection("holds numbers of a big-endian machine")
        content = self.unpickle(self.file)
        keys = self.unpickle(self.file)
        if type(keys) is not list or sorted(map(str, keys)) != sorted(self.storages):
            raise Objection("names other storages than its tensors lie in")
        for key in keys:
            numbers = self.storages[key].numbers
            (count,) = struct.unpack("<q", self.file.read(8))
            if count != len(numbers):
                raise Objection(f"tells of the storage {shown(key)} in two ways")
            data = numbers.view(torch.uint8).numpy().data
            if self.file.readinto(data) != len(data):  # type: ignore[attr-defined]
                raise Objection("is only the beginning of a file")
        return content

    def numbers(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        self.allocated += count * dtype.itemsize
        if self.allocated > self.size:
            raise Objection("has storages with more numbers than the file holds")
        return torch.empty(count, dtype=dtype)


def _check_directory(file: IO[bytes], size: int) -> None:
    """Refuse a zip file whose list of entries is too long to be read into objects."""
    file.seek(max(0, size - _END.size - _LOCATOR_64.size))
    tail = file.read()
    end = tail[-_END.size :]
    if not end.startswith(b"PK\x05\x06") or len(end) < _END.size:
        raise Objection("is only the beginning of an archive, or has something after its end")
    _, _, _, _, count, length, _, _ = _END.unpack(end)
    locator = tail[: -_END.size]
    if locator.startswith(b"PK\x06\x07") and len(locator) == _LOCATOR_64.size:
        file.seek(_LOCATOR_64.unpack(locator)[2])
        record = file.read(_END_64.size)
        if len(record) < _END_64.size or not record.startswith(b"PK\x06\x06"):
            raise Objection("is a damaged archive")
        *_, count, length, _ = _END_64.unpack(record)
    if length > min(size, _LARGEST_DIRECTORY) or 46 * count > length:
        raise Objection(f"lists {count} entries in {length} bytes, beyond what is read")


def _size(*numbers: Any) -> tuple[int, ...]:
    """torch.Size(numbers)"""
    sizes = numbers[0] if numbers else ()
    if not _are_sizes(sizes):
        raise Objection("has a size that is none")
    return tuple(sizes)


def _device(name: Any = "cpu", index: Any = None) -> str:
    """torch.device(name), as text."""
    return shown(name) if index is None else f"{shown(name)}:{shown(index)}"


def _parameter(data: Any, *_: Any) -> Any:  # whether it has a gradient, and hooks
    return data


def _bytes(text: Any, encoding: Any) -> bytes:
    """_codecs.encode, by which bytes are written into older pickles."""
    if type(text) is not str or encoding != "latin1":
        raise Objection("encodes text otherwise than as bytes are pickled")
    return text.encode("latin1")


def _number(kind: Any, data: Any) -> Any:
    """A number of NumPy's, as Python's."""
    formats = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "u1": "<B", "b1": "<?"}
    if not isinstance(kind, _NumPyType) or kind.arguments[:1] not in {(f,) for f in formats}:
        return Record(kind, data)
    if type(kind.state) is not tuple or kind.state[1:2] == (">",) or type(data) is not bytes:
        raise Objection("holds a number of NumPy's that cannot be")
    return struct.unpack(formats[kind.arguments[0]], data)[0]


def _members(items: Any = ()) -> tuple[Any, ...]:
    """set(items) and frozenset(items), whose members are hashed by nobody here."""
    if type(items) is not list:
        raise Objection("makes a set of what is no list")
    return tuple(items)


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number <= _LARGEST_SIZE


def _are_sizes(numbers: Any) -> bool:
    return type(numbers) in (tuple, list) and all(map(_is_size, numbers))


# Stand-ins for objects that training programs save beside the tensors; none does anything.
_BESIDE: dict[str, Any] = {
    "argparse Namespace": record("Namespace"),
    "pathlib PosixPath": record("Path"),
    "pathlib WindowsPath": record("Path"),
    "collections defaultdict": lambda *_: {},
    **{f"__builtin__ {name}": None for name in ("bool", "dict", "float", "int", "list", "str")},
    "__builtin__ set": _members,
    "__builtin__ frozenset": _members,
    "_codecs encode": _bytes,
    "numpy dtype": _NumPyType,
    "numpy ndarray": None,
    "lightning.fabric.utilities.data AttributeDict": ordered_dict,
    "lightning_fabric.utilities.data AttributeDict": ordered_dict,
    "pytorch_lightning.utilities.parsing AttributeDict": ordered_dict,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _BESIDE[f"{_module} scalar"] = _number
    _BESIDE[f"{_module} _reconstruct"] = record("ndarray", has_state=True)
