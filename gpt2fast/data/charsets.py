"""The encoding of a text: UTF-8, UTF-16 or UTF-32 by its mark, others when they are named.

Nothing is guessed in silence: the 8-bit encodings of Latin script differ in single letters, and a
wrong guess is a text with wrong letters. A text that is not UTF-8 is refused with the encoding that
it looks like, and read when that is named.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from ..errors import DataError, reason_of, shown
from .kinds import PEEK, piped

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
_SEVEN_BITS = (
    (re.compile(rb"\x1b\$(?:[@B]|\([@-D])"), "iso2022_jp"),
    (re.compile(rb"\x1b\$\)C"), "iso2022_kr"),
    (re.compile(rb"(?:~\{(?:[!-w][!-~])+~\}.*?){3}", re.DOTALL), "hz"),
)


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


def check_text(path: Path, data: bytes, start: int) -> None:
    """Raise DataError where bytes in UTF-8 are no text all the same: they hold NULs, or the escapes
    of an encoding in seven bits. `data` begins at the byte `start` of the file.
    """
    if 0 in data:
        raise _zeros(path, data, start)
    if b"\x1b" in data or b"~{" in data:
        for pattern, encoding in _SEVEN_BITS:
            if pattern.search(data):
                raise DataError(
                    f"{path} is text in {encoding.upper()}, whose escapes are ASCII. "
                    f"{_ways(path, encoding)}"
                )


def _zeros(path: Path, data: bytes, start: int) -> DataError:
    place = data.find(0)
    # Latin text of two bytes a character has a NUL in each, other text in each space.
    places = [at for at in range(place, min(len(data), place + PEEK)) if not data[at]]
    encoding = _wide_encoding(data[:PEEK], start) or _by_parity([start + at for at in places])
    found = f"{path} is not UTF-8 text: byte {start + place} is 0"
    if encoding is not None:
        return DataError(
            f"{found}, as in {encoding.upper()} without a byte order mark. {_ways(path, encoding)}"
        )
    clean = piped(path, "tr -d '\\000' <").removesuffix(" <")
    return DataError(
        f"{found}, which no text has; if this is one, `{clean} > cleaned.txt` leaves such bytes out"
    )


def check_decoded(path: Path, text: str, encoding: str) -> None:
    """Raise DataError where the beginning of a decoded text shows that its bytes were swapped."""
    if not encoding.startswith("utf-16"):
        return
    # The space and the new line, with their bytes in the other order.
    if text.count("\u2000") + text.count("\u0a00") > text.count(" ") + text.count("\n"):
        raise DataError(
            f"{path} is not {encoding}: its bytes are in the other order; name utf-16-le or "
            "utf-16-be, whichever this is not"
        )


def _wide_encoding(beginning: bytes, start: int) -> str | None:
    """The encoding of Latin text with two or four bytes a character, if this is it."""
    if len(beginning) < 8 or start % 4:
        return None
    # Share of zeros at each of the four places in a group of four bytes.
    shares = [part.count(0) / len(part) for part in (beginning[i::4] for i in range(4))]
    for encoding, zero, rest in (
        ("utf-32le", (2, 3), (0,)),
        ("utf-32be", (0, 1), (3,)),
        ("utf-16le", (1, 3), (0, 2)),
        ("utf-16be", (0, 2), (1, 3)),
    ):
        if min(shares[i] for i in zero) > 0.6 and max(shares[i] for i in rest) < 0.1:
            return encoding
    return None


def _by_parity(places: list[int]) -> str | None:
    """UTF-16 of either order where zeros stand at even, or at odd places alone."""
    odd = sum(place % 2 for place in places)
    if len(places) < 2 or 0 < odd < len(places):
        return None
    return "utf-16le" if odd else "utf-16be"


def not_utf8(path: Path, data: bytes, error: UnicodeDecodeError, start: int) -> DataError:
    """The error for a text that is not UTF-8: where, and what it looks like.

    `error` came of decoding `data`, which begins at the byte `start` of the file.
    """
    if 0 in data[: error.start + PEEK]:
        return _zeros(path, data, start)
    place = f"{path} is not UTF-8 text: at byte {start + error.start}"
    if error.reason == "unexpected end of data":
        found = f"0x{data[error.start]:02x} begins a character that the end of the file cuts"
        return DataError(f"{place}, {found}; fetch the file again, or cut off its last bytes")
    found = f"0x{data[error.start]:02x} does not fit ({error.reason})"
    if _mostly_utf8(data[max(0, error.start - _SAMPLE_BYTES) :][: 2 * _SAMPLE_BYTES]):
        return DataError(
            f"{place}, {found}, though the text around it is UTF-8: this place is damaged. "
            f"`{piped(path, 'iconv -c -f utf-8 -t utf-8')} > converted.txt` leaves it out"
        )
    return DataError(f"{place}, {found}. {guess(path, data[error.start :][:_SAMPLE_BYTES])}")


def not_encoded(path: Path, error: UnicodeError, encoding: str) -> DataError:
    """The error for a text that is not in the encoding that was named, or that its mark tells."""
    return DataError(
        f"{path} cannot be read as {encoding}: {reason_of(error, 200)}; name another encoding, or "
        "mend the file"
    )


def _mostly_utf8(sample: bytes) -> bool:
    text = sample.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    return sum(not c.isascii() for c in text) - broken > 10 * broken


def guess(path: Path, sample: bytes) -> str:
    """The likely encoding of a text, and how to have it read; `sample` begins where UTF-8 ends."""
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
    words = " ".join(lines[0].decode("cp1252", "replace").split())[:40] if lines else ""
    return (
        f"As cp1252 (Western European) it says {words!r}; if those are the wrong letters, try "
        "cp1250 (Central European), cp1254 (Turkish), cp1257 (Baltic), cp1258 (Vietnamese), "
        f"mac_roman or cp850. {_ways(path, 'cp1252')}"
    )


def _ways(path: Path, encoding: str) -> str:
    return (
        f"Let `python -m gpt2fast.prepare` read it with --encoding {encoding}, or convert it: "
        f"`{piped(path, f'iconv -f {encoding} -t utf-8')} > converted.txt`"
    )
