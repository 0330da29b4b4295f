"""Changes of an input that keep its form now and then: of bytes, JSON values, headers, archives."""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile

from targets import joined, sections

NUMBERS = (0, -1, 1, 2, 127, 128, 255, 256, 65535, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 32,
           1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, 10**40, 10**308, 10**400)  # fmt: skip
VALUES: tuple[object, ...] = (
          None, True, False, 0.0, -0.0, 1.5, 1e308, 5e-324, float("inf"), float("nan"), "", "a",
          "\0", "../x", "/etc/passwd", "\ud800", "é\u2028", "\x1b[31m", "x" * 5000, [], {}, [[]],
          {"": 0}, [None], {"type": "BPE"})  # fmt: skip
WORDS = (b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b",", b":",
         b"\\", b"\n", b"\r", b"null", b"1e999", b"NaN", b"-1", b"9" * 400, b"&a ", b"*a", b"<<: ",
         b"!!int ", b"\\ud800", b"[" * 200, b"<|endoftext|>", b"0x", b"../")  # fmt: skip
LARGEST = 1 << 16


def mutate(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """`data`, changed in one to four places.

    Args:
        data: an input.
        chance: where the changes come from.
        others: inputs of the same target, of which parts may come in.
    """
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = _one(data, chance, others)
    return data[:LARGEST]


def _one(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    files = sections(data)
    if files and chance.random() < 0.9:
        name = chance.choice(list(files))
        if chance.random() < 0.05:
            del files[name]
        elif chance.random() < 0.05:
            files[name] = chance.choice(list(files.values()))
        else:
            files[name] = _inner(files[name], chance, others)
        return joined(files)
    return _inner(data, chance, others)


def _inner(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    if chance.random() < 0.7:
        for form in (_safetensors, _zip, _json, _json_lines):
            changed = form(data, chance, others)
            if changed is not None:
                return changed
    return _bytes(data, chance, others)


def _safetensors(data: bytes, chance: random.Random, others: list[bytes]) -> bytes | None:
    length = struct.unpack("<Q", data[:8])[0] if len(data) > 8 else 0
    if not 2 <= length <= len(data) - 8 or data[8:9] != b"{":
        return None
    header = _json(data[8 : 8 + length], chance, others)
    if header is None or chance.random() < 0.2:
        header = _bytes(data[8 : 8 + length], chance, others)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _zip(data: bytes, chance: random.Random, others: list[bytes]) -> bytes | None:
    if not data.startswith(b"PK"):
        return None
    made = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [(name, archive.read(name)) for name in archive.namelist()]
        place = next((i for i, (n, _) in enumerate(entries) if n.endswith("data.pkl")), 0)
        if chance.random() < 0.2:
            place = chance.randrange(len(entries))
        name, content = entries[place]
        entries[place] = (name, _pickle(content, chance, others))
        with zipfile.ZipFile(made, "w") as archive:
            for name, content in entries:
                archive.writestr(name, content)
    except Exception:  # a damaged archive stays one
        return None
    return made.getvalue()


def _pickle(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    if chance.random() < 0.5:
        return _bytes(data, chance, others)
    # A number, or an instruction in another one's place.
    at = chance.randrange(len(data) or 1)
    step = chance.choice(b"}]()tuseabR\x81\x93.0q2hQcX\x8aKMJN\x88\x8c\x94h")
    return data[:at] + bytes([step]) + data[at + chance.choice((0, 1)) :]


def _json(data: bytes, chance: random.Random, _: list[bytes]) -> bytes | None:
    try:
        value = json.loads(data.rstrip(b" \0"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, (dict, list)):
        return None
    value = _changed(value, chance)
    try:
        text = json.dumps(value, ensure_ascii=chance.random() < 0.9)
        return text.encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return None


def _json_lines(data: bytes, chance: random.Random, others: list[bytes]) -> bytes | None:
    lines = data.split(b"\n")
    place = chance.randrange(len(lines))
    changed = _json(lines[place], chance, others) if lines[place][:1] in (b"{", b"[") else None
    if changed is None:
        return None
    return b"\n".join([*lines[:place], changed, *lines[place + 1 :]])


def _changed(value: object, chance: random.Random) -> object:
    """A JSON value with one node of it changed."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = chance.choice(keys)
        what = chance.random()
        if what < 0.08:
            del value[key]  # type: ignore[arg-type]
        elif what < 0.16 and isinstance(value, list):
            value.insert(key, value[chance.choice(keys)])
        elif what < 0.16 and isinstance(value, dict):
            value[str(chance.choice(VALUES))] = value[chance.choice(keys)]
        elif what < 0.24:
            value[key] = value[chance.choice(keys)]  # type: ignore[index]
        else:
            value[key] = _changed(value[key], chance)  # type: ignore[index]
        return value
    if isinstance(value, str) and chance.random() < 0.4:
        at = chance.randrange(len(value) + 1)
        return value[:at] + chance.choice(("", "x", "\0", " ", "\ud800", "é")) + value[at + 1 :]
    if chance.random() < 0.3:
        return [value] if chance.random() < 0.5 else {"a": value}
    return chance.choice(NUMBERS if chance.random() < 0.5 else VALUES)


def _bytes(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    at = chance.randrange(len(data) + 1)
    what = chance.randrange(9)
    if what == 0 and data:
        changed = bytearray(data)
        changed[at % len(data)] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if what == 1:
        return data[:at] + data[at + chance.choice((1, 2, 4, 8, 64)) :]
    if what == 2:
        return data[:at] + chance.choice(WORDS) + data[at:]
    if what == 3:
        end = at + chance.choice((1, 8, 64, 300))
        return data[:end] + data[at:]
    if what == 4 and others:
        other = chance.choice(others)
        return data[:at] + other[chance.randrange(len(other) + 1) :]
    if what == 5:
        number = chance.choice(NUMBERS) & ((1 << 64) - 1)
        size = chance.choice((1, 2, 4, 8))
        return data[:at] + number.to_bytes(8, "little")[:size] + data[at + size :]
    if what == 6:
        found = list(re.finditer(rb"-?[0-9]+", data))
        if found:
            match = chance.choice(found)
            digits = str(chance.choice(NUMBERS)).encode()
            return data[: match.start()] + digits + data[match.end() :]
    if what == 7:
        return data[:at]
    lines = data.split(b"\n")
    line = chance.randrange(len(lines))
    return b"\n".join([*lines[:line], lines[chance.randrange(len(lines))], *lines[line:]])
