"""Which encoding a text is in: UTF-8, UTF-16 or UTF-32 by its mark, others when they are named.

Nothing is guessed in silence: the 8-bit encodings of Latin script differ in single letters, and a
wrong guess is a text with wrong letters. A text that is not UTF-8 is refused with the encoding that
it looks like, and read when that is named.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from ..errors import DataError, printable, shown
from .kinds import PEEK, quoted

MARKS = (
    # UTF-32 first: its little-endian mark begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UTF8 = frozenset({"utf-8", "utf-8-sig"})
_LIKELY = (
    "cp932", "euc-jp", "gb18030", "big5", "cp949", "cp1251", "koi8-r", "cp866", "cp1253", "cp1255",
    "cp1256", "cp874", "cp1252", "cp1250", "cp1254", "cp1257",
)  # fmt: skip
_NAMES = {
    "cp932": "Shift-JIS", "euc-jp": "EUC-JP", "gb18030": "GB18030 (GBK)", "big5": "Big5",
    "cp949": "EUC-KR", "cp1251": "Windows-1251 (Cyrillic)", "koi8-r": "KOI8-R (Cyrillic)",
    "cp866": "DOS Cyrillic", "cp1253": "Windows-1253 (Greek)", "cp1255": "Windows-1255 (Hebrew)",
    "cp1256": "Windows-1256 (Arabic)", "cp874": "Windows-874 (Thai)",
}  # fmt: skip
_SAMPLE_BYTES = 1 << 16


def known_encoding(name: str | None) -> str | None:
    """The name of an encoding as Python has it; None for UTF-8 and for None.

    Raises:
        DataError: Python knows no such encoding of text.
    """
    if name is None:
        return None
    try:
        found = codecs.lookup(name)
    except (LookupError, ValueError):
        found = None
    if found is None or not getattr(found, "_is_text_encoding", True):
        raise DataError(
            f"there is no encoding {shown(name)}; examples are utf-16, cp932 (Shift-JIS), gb18030, "
            "cp1252 (Western European), cp1251 (Cyrillic)"
        )
    return None if found.name in _UTF8 else found.name


def marked_encoding(beginning: bytes) -> str | None:
    """The encoding that the byte order mark at the beginning of a text tells, other than UTF-8."""
    return next((name for mark, name in MARKS if beginning.startswith(mark)), None)


def refuse_wide(path: Path, beginning: bytes) -> None:
    """Raise DataError where a file, which begins with `beginning`, has two or four bytes a
    character without a mark: such Latin text is valid UTF-8 that is full of NULs."""
    beginning = beginning[:PEEK]
    if len(beginning) < 16:
        return
    # How many bytes are 0 at each of the four places in a group of four.
    shares = [part.count(0) / len(part) for part in (beginning[i::4] for i in range(4))]
    for encoding, zero, rest in (
        ("utf-32le", (2, 3), (0,)),
        ("utf-32be", (0, 1), (3,)),
        ("utf-16le", (1, 3), (0, 2)),
        ("utf-16be", (0, 2), (1, 3)),
    ):
        if min(shares[i] for i in zero) > 0.6 and max(shares[i] for i in rest) < 0.1:
            raise DataError(
                f"{path} is not UTF-8 text: so many of its first bytes are 0 as in "
                f"{encoding.upper()} without a byte order mark. {_ways(path, encoding)}"
            )


def not_utf8(path: Path, data: bytes, error: UnicodeDecodeError, start: int) -> DataError:
    """The error for a text that is not UTF-8: where, and what it looks like.

    Args:
        path: the file.
        data: bytes of it around the place.
        error: of decoding `data`.
        start: byte of the file at which `data` begins.
    """
    place = f"{path} is not UTF-8 text: at byte {start + error.start}"
    if error.reason == "unexpected end of data":
        found = f"0x{data[error.start]:02x} begins a character that the end of the file cuts"
        return DataError(f"{place}, {found}; fetch the file again, or cut off its last bytes")
    found = f"0x{data[error.start]:02x} does not fit ({error.reason})"
    if _mostly_utf8(data[max(0, error.start - _SAMPLE_BYTES) :][: 2 * _SAMPLE_BYTES]):
        return DataError(
            f"{place}, {found}, though the text around it is UTF-8: this place is damaged. "
            f"`iconv -c -f utf-8 -t utf-8 {quoted(path)} > converted.txt` leaves it out"
        )
    return DataError(f"{place}, {found}. {_guess(path, data[error.start :][:_SAMPLE_BYTES])}")


def not_encoded(path: Path, error: UnicodeError, encoding: str) -> DataError:
    """The error for a text that is not in the encoding that was named, or that its mark tells."""
    reason = printable(" ".join(str(error).split()))[:200]
    return DataError(
        f"{path} cannot be read as {encoding}: {reason}; name another encoding, or mend the file"
    )


def _mostly_utf8(sample: bytes) -> bool:
    text = sample.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    return sum(not c.isascii() for c in text) - broken > 10 * broken


def _guess(path: Path, sample: bytes) -> str:
    from charset_normalizer import from_bytes

    # The letters decide, not the English around them.
    lines = [line for line in sample.splitlines() if not line.isascii()]
    found = None
    if sum(byte > 127 for byte in sample) >= 8:
        found = from_bytes(b"\n".join(lines), cp_isolation=list(_LIKELY)).best()
    name = "" if found is None else found.encoding.replace("_", "-")
    if name in _NAMES:
        words = " ".join(str(found).split())[:40]
        return f"It looks like {_NAMES[name]}: {words!r}. {_ways(path, name)}"
    return (
        "It may be in one of the older encodings: cp1252 for Western European languages, cp1250 "
        f"for Central European ones. {_ways(path, 'cp1252')}"
    )


def _ways(path: Path, encoding: str) -> str:
    return (
        f"Let `python -m gpt2fast.prepare` read it with --encoding {encoding}, or convert it: "
        f"`iconv -f {encoding} -t utf-8 {quoted(path)} > converted.txt`"
    )
