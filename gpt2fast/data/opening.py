"""Opening text: decompressed, and in UTF-8, whatever the file is; read forward in pieces.

Compression is told by the first bytes, not by the name. A compressed or recoded text is read from
its beginning again where reading is to go on in the middle.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from ..errors import DataError, reason_of, shown
from .charsets import check_decoded, check_text, marked_encoding, not_encoded, not_utf8
from .kinds import (
    PEEK,
    compression_of,
    document_in_zip,
    quoted,
    refuse_other_than_text,
    refused,
)

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zip")
LARGEST = 2 << 30
"""Bytes of a text that is read as a whole: twice enwik9."""
_READ_BYTES = 1 << 20
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


class TextInput:
    """A file of text, compressed or not, as a stream of bytes in UTF-8.

    Its encoding is what `known_encoding` gives; None means UTF-8, or what a byte order mark says.
    """

    def __init__(self, path: Path, encoding: str | None = None) -> None:
        self.path = path
        self.encoding = encoding
        self.done = 0
        """Bytes of the file read so far."""
        self.as_stored = True
        """The stream's bytes are those of the file (known when it is open)."""

    @contextmanager
    def open(self, start: int = 0) -> Iterator[BinaryIO]:
        """The text from byte `start` of its UTF-8 form on.

        Raises:
            DataError: the file is no text, is damaged, cannot be read, or is not in its encoding;
                the stream's methods raise it, too.
        """
        with ExitStack() as stack, self._explained():
            raw = stack.enter_context(io.BufferedReader(_CountingFile(self), _READ_BYTES))
            file = stack.enter_context(self._decompressed(raw))
            self.as_stored = file is raw
            beginning = file.peek(PEEK)
            if not self.as_stored and compression_of(beginning) is not None:
                raise DataError(f"{self.path} is compressed twice; unpack it once and give that")
            refuse_other_than_text(self.path, beginning)
            # A mark says more than a name that holds for several files.
            encoding = marked_encoding(beginning)
            if encoding is None and not beginning.startswith(codecs.BOM_UTF8):
                encoding = self.encoding
            if encoding is not None:
                self.as_stored = False
                recoded = _Recoded(file, encoding, self.path)
                file = stack.enter_context(io.BufferedReader(recoded, _READ_BYTES))
            _skip(file, start)
            yield cast(BinaryIO, file)

    def read_text(self) -> str:
        """All of it. Ends of lines stay as they are; a byte order mark is dropped."""
        data = self.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise not_utf8(self.path, data, error, 0) from None
        check_text(self.path, data, 0)
        return text

    def read_bytes(self) -> bytes:
        """All of it, in UTF-8 unless it is not text."""
        pieces, size = [], 0
        with self.open() as file:
            while piece := file.read(_READ_BYTES):
                pieces.append(piece)
                size += len(piece)
                if size > LARGEST:  # packed, it may be a thousand times smaller
                    raise DataError(
                        f"{self.path} has more than {LARGEST >> 20} MB of text, the most that are "
                        "read at once; cut it into smaller files"
                    )
        return b"".join(pieces)

    def _decompressed(self, raw: Any) -> Any:
        compression = compression_of(raw.peek(PEEK)[:PEEK])
        opened: Any
        if compression == "gzip":
            opened = gzip.GzipFile(fileobj=raw)
        elif compression == "bzip2":
            opened = bz2.BZ2File(raw)
        elif compression == "xz":
            opened = lzma.LZMAFile(raw)  # noqa: SIM115
        elif compression == "zstd":
            opened = _zstd(self.path, raw)
        elif compression == "zip":
            opened = _only_member(self.path, raw)
        elif self.path.suffix.lower() in COMPRESSED_SUFFIXES and raw.peek(1):
            raise DataError(
                f"{self.path} cannot be unpacked: it is not what its name says; it is damaged, or "
                f"text that was unpacked already: then take {self.path.suffix} off its name"
            )
        else:
            return raw
        return io.BufferedReader(opened, _READ_BYTES)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGED as error:
            raise DataError(
                f"{self.path} cannot be unpacked: {reason_of(error)}; it is cut short or damaged, "
                "fetch it again"
            ) from None
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {reason_of(error)}") from None


class _Stream(io.RawIOBase):
    """Bytes that `_advance` makes: it sets `_ready` to the next ones, and `_ended`."""

    _ready = b""
    _ended = False

    def readable(self) -> bool:
        return True

    def _advance(self) -> None:
        raise NotImplementedError

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            self._advance()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


class _Recoded(_Stream):
    """Text of another encoding as UTF-8."""

    def __init__(self, file: io.BufferedReader, encoding: str, path: Path) -> None:
        self._file, self._encoding, self._path = file, encoding, path
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._as_utf8: codecs.IncrementalDecoder | None = None
        if not encoding.startswith("utf"):
            self._as_utf8 = codecs.getincrementaldecoder("utf-8")()
        self._only_ascii = self._first = True

    def _advance(self) -> None:
        data = self._file.read(_READ_BYTES)
        self._ended = not data
        self._watch(data)
        try:
            text = self._decoder.decode(data, final=self._ended)
            self._ready = text.encode()
        except UnicodeError as error:
            raise not_encoded(self._path, error, self._encoding) from None
        if self._first:
            check_decoded(self._path, text, self._encoding)
            self._first = False

    def _watch(self, data: bytes) -> None:
        """Raise DataError at the end of a text that has been UTF-8 all along."""
        self._only_ascii = self._only_ascii and data.isascii()
        if self._as_utf8 is None:
            return
        try:
            self._as_utf8.decode(data, final=self._ended)
        except UnicodeDecodeError:
            self._as_utf8 = None
            return
        if self._ended and not self._only_ascii:
            raise DataError(
                f"{self._path} is UTF-8, and would become something else as {self._encoding}; give "
                "it without --encoding (encoding=None), apart from files that need it"
            )


class _CountingFile(io.FileIO):
    """Tells a TextInput how far it is read."""

    def __init__(self, text: TextInput) -> None:
        if text.path.exists() and not text.path.is_file():
            raise DataError(f"{text.path} is no regular file; pipe its text in and give - instead")
        super().__init__(text.path)
        self._text = text

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self._text.done = self.tell()
        return count


def _skip(file: IO[bytes], count: int) -> None:
    if file.seekable():
        file.seek(count)
        return
    while count and (piece := file.read(min(count, _READ_BYTES))):
        count -= len(piece)


def _zstd(path: Path, raw: IO[bytes]) -> io.RawIOBase:
    try:
        import zstandard
    except ImportError:
        raise DataError(
            f"{path} is compressed by zstd, which needs zstandard: pip install zstandard; or "
            f"unpack it first: `zstd -d {quoted(path)}`"
        ) from None
    return _Zstd(raw, zstandard)


class _Zstd(_Stream):
    """Frames of zstd, one after another; unlike zstandard's own reader it sees a file cut short."""

    def __init__(self, file: IO[bytes], zstandard: Any) -> None:
        self._file, self._zstandard = file, zstandard
        self._frame: Any = None
        self._data = b""

    def _advance(self) -> None:
        # Small pieces: each may become thousands of times as long.
        data = self._data or self._file.read(1 << 14)
        self._data = b""
        if self._frame is None:
            self._ended = not data
            self._frame = self._zstandard.ZstdDecompressor().decompressobj()
        elif not data:
            raise EOFError("the file ends before the compressed text does")
        try:
            self._ready = self._frame.decompress(data)
        except self._zstandard.ZstdError as error:
            raise zlib.error(str(error)) from None
        if self._frame.eof:
            self._data, self._frame = self._frame.unused_data, None


def _only_member(path: Path, raw: IO[bytes]) -> Any:
    archive = zipfile.ZipFile(raw)
    document = document_in_zip(archive)
    if document is not None:
        raise refused(path, *document)
    files = members(archive)
    if len(files) != 1:
        names = ", ".join(shown(info.filename) for info in files[:3])
        more = ", …" if len(files) > 3 else ""
        raise DataError(
            f"{path} holds {len(files)} files ({names}{more}); unpack it (`unzip {quoted(path)}`) "
            "and name the file or the folder"
        )
    try:
        return archive.open(files[0])
    except (RuntimeError, NotImplementedError) as error:
        raise DataError(
            f"{path} cannot be unpacked: {error}; unpack it and name the file"
        ) from None


def members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files in a zip archive, without what macOS puts there of its own."""
    return [
        info
        for info in archive.infolist()
        if not info.is_dir() and not info.filename.startswith("__MACOSX/")
    ]
