"""The kind of a file by its first bytes: text, compressed text, or something that is no text."""

from __future__ import annotations

import codecs
import json
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError, printable

PEEK = 4096
"""Bytes from the beginning of a file by which its kind is told."""
PARQUET = b"PAR1"
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # the first block of data, or the end at once
_MAGICS = (
    (b"\x1f\x8b\x08", "gzip"), (b"\xfd7zXZ\0", "xz"), (b"\x5d\0\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"), (b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"),
)  # fmt: skip


class _Kind(NamedTuple):
    name: str
    way: str
    """The way to its text, with FILE for the name of the file."""


_PANDOC = "convert it first, e.g. `pandoc FILE -t plain -o text.txt`"
_OFFICE = "save it as plain text in UTF-8 and give that"
_NO_TEXT = "give the text itself"
_DOCUMENTS_IN_ZIP = {
    "word/": _Kind("a Word document (.docx)", _PANDOC),
    "xl/": _Kind("an Excel workbook (.xlsx)", "save the sheet as .csv and give that"),
    "ppt/": _Kind("a PowerPoint file (.pptx)", _OFFICE),
    "META-INF/container.xml": _Kind("an EPUB book", _PANDOC),
    "content.xml": _Kind("an OpenDocument file (.odt)", _PANDOC),
    "Index/Document.iwa": _Kind("an Apple Pages or Numbers file", _OFFICE),
    "META-INF/MANIFEST.MF": _Kind("a Java archive", _NO_TEXT),
}
_TOKENS = (
    "`python -m gpt2fast.train --data FOLDER` takes a folder of such files, with train and val in "
    "their names"
)
_WEIGHTS = "weights are not text: give the text to train on; --init-from takes weights"
_KINDS: tuple[tuple[bytes, _Kind], ...] = (
    (b"%PDF-", _Kind("a PDF", "extract its text first, e.g. `pdftotext FILE text.txt`")),
    (b"{\\rtf", _Kind("a rich text document (.rtf)", _PANDOC)),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _Kind("an old Office document (.doc, .xls)", _OFFICE)),
    (b"7z\xbc\xaf\x27\x1c", _Kind("a 7z archive", "unpack it first: `7z x FILE`")),
    (b"Rar!\x1a\x07", _Kind("a RAR archive", "unpack it first: `unrar x FILE`")),
    (b"\x04\x22\x4d\x18", _Kind("compressed by lz4", "unpack it first: `lz4 -d FILE`")),
    (b"\x1f\x9d", _Kind("compressed by compress (.Z)", "unpack it first: `uncompress FILE`")),
    (b"SQLite format 3\0", _Kind("an SQLite database", "export the text's column as .csv")),
    (b"ARROW1\0\0", _Kind("an Arrow file", "name its folder with --dataset")),
    (b"\xff\xff\xff\xff", _Kind("an Arrow stream", "name its folder with --dataset")),
    (b"\x93NUMPY", _Kind("a NumPy array (.npy)", _TOKENS)),
    (b"\x88\xd8\x34\x01", _Kind("a file of tokens in llm.c's format", _TOKENS)),
    (b"\xc6\xd7\x34\x01", _Kind("a model in llm.c's format", _WEIGHTS)),
    (b"\x89HDF\r\n\x1a\n", _Kind("an HDF5 file", _NO_TEXT)),
    (b"\x89PNG\r\n\x1a\n", _Kind("an image", _NO_TEXT)),
    (b"\xff\xd8\xff", _Kind("an image", _NO_TEXT)),
    (b"\x7fELF", _Kind("a program", _NO_TEXT)),
    (b"\x1a\x45\xdf\xa3", _Kind("a video", _NO_TEXT)),
    (b"\xca\xfe\xba\xbe", _Kind("a program", _NO_TEXT)),
    (b"!<arch>\n", _Kind("an archive of object files", _NO_TEXT)),
)
_KINDS_WITH_ZEROS: tuple[tuple[bytes, _Kind], ...] = (
    # These begin with letters, as a text may; but no text holds a NUL.
    (b"GGUF", _Kind("a GGUF file of weights", _WEIGHTS)),
    (b"GIF8", _Kind("an image", _NO_TEXT)),
    (b"RIFF", _Kind("sound, an image or a video", _NO_TEXT)),
    (b"OggS", _Kind("sound or a video", _NO_TEXT)),
    (b"fLaC", _Kind("sound", _NO_TEXT)),
    (b"ID3", _Kind("sound", _NO_TEXT)),
    (b"MZ", _Kind("a program", _NO_TEXT)),
    (b"BM", _Kind("an image", _NO_TEXT)),
    (b"wOF", _Kind("a font", _NO_TEXT)),
)
_UNPACK = {
    ".gz": "gzip -dc", ".bz2": "bzip2 -dc", ".xz": "xz -dc", ".lzma": "xz -dc", ".zst": "zstd -dc",
    ".zip": "unzip -p",
}  # fmt: skip
_PICKLE = re.compile(rb"\x80[\x02-\x05][\x95}\](cK\x8c\x8a]")


def refuse_other_than_text(path: Path, beginning: bytes) -> None:
    """Raise DataError where a file, which begins with `beginning`, is known to be no text.

    The message says what it is, and the way from there to text.
    """
    kind = _kind_of(beginning)
    if kind is not None:
        raise refused(path, kind.name, kind.way)


def compression_of(beginning: bytes) -> str | None:
    """The compression of a file that begins so; None without any."""
    if beginning.startswith(b"BZh") and beginning[4:10] in _BZIP2_BLOCKS:
        return "bzip2"
    if beginning[1:4] == b"\x2a\x4d\x18" and beginning[0] & 0xF0 == 0x50:
        return "zstd"
    return next((name for magic, name in _MAGICS if beginning.startswith(magic)), None)


def refused(path: Path, what: str, way: str) -> DataError:
    """The error for a file that is `what` (with an article); FILE in the `way` out is its name."""
    return DataError(f"{path} is {what}, not text; {way.replace('FILE', quoted(path))}")


def quoted(path: Path) -> str:
    """The name of a file as a shell reads it, printable."""
    name = printable(path.name)
    return name if re.fullmatch(r"[\w./+@-]+", name) else "'" + name.replace("'", "'\\''") + "'"


def piped(path: Path, command: str) -> str:
    """A command on a file, or on what is packed in it."""
    unpack = _UNPACK.get(path.suffix.lower())
    return f"{command} {quoted(path)}" if unpack is None else f"{unpack} {quoted(path)} | {command}"


def document_in_zip(archive: zipfile.ZipFile) -> tuple[str, str] | None:
    """The kind of document in a zip archive, and the way to its text; None for other archives."""
    names = archive.namelist()
    for mark, kind in _DOCUMENTS_IN_ZIP.items():
        if any(name == mark or (mark.endswith("/") and name.startswith(mark)) for name in names):
            return kind
    if any(name.endswith(("/data.pkl", "/.data/serialization_id")) for name in names):
        return _Kind("a PyTorch checkpoint", _WEIGHTS)
    if names and all(name.endswith(".npy") for name in names):
        return _Kind("NumPy arrays (.npz)", _NO_TEXT)
    return None


def _kind_of(beginning: bytes) -> _Kind | None:
    for magic, kind in _KINDS:
        if beginning.startswith(magic):
            return kind
    if beginning[257:262] == b"ustar":
        return _Kind("a tar archive", "unpack it first (`tar xf FILE`) and name the folder")
    if _PICKLE.match(beginning):
        return _Kind("a Python pickle", _NO_TEXT)
    if b"\0" not in beginning:
        return None
    for magic, kind in _KINDS_WITH_ZEROS:
        if beginning.startswith(magic):
            return kind
    if beginning[4:8] == b"ftyp":
        return _Kind("a video or an image", _NO_TEXT)
    if beginning[8:10] == b'{"' and beginning[4:8] == b"\0\0\0\0":
        return _Kind("a safetensors file of weights", _WEIGHTS)
    if beginning[4:8] in (b"TFL3", b"\0\0\0\0") and beginning[:1] == b"\x08":
        return _Kind("a file of weights", _WEIGHTS)
    return None


def begins_with_json_objects(beginning: bytes) -> bool:
    """The first lines are JSON objects, each whole on its line: these are JSON lines, not prose."""
    lines = [line for line in beginning.removeprefix(codecs.BOM_UTF8).split(b"\n") if line.strip()]
    if not lines or not lines[0].lstrip().startswith(b"{"):
        return False
    try:
        return all(isinstance(json.loads(line), dict) for line in lines[:2])
    except (ValueError, RecursionError):
        return False
