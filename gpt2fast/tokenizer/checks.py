"""Reading a tokenizer's files, and the checks that turn broken ones into one clear error."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from .added_tokens import AddedToken

SUPPORTED = "supported is GPT-2's byte-level BPE"

_MAX_BYTES = 64 << 20
_MAX_IDS = 1 << 24


def added_token(token: Any, id: Any, field: str) -> AddedToken:
    if not isinstance(token, dict):
        raise TokenizerError(f"{field} is {token!r:.80}, not an object")
    content = token.get("content")
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"{field}: content is {content!r:.80}, not a string with characters")
    _check_unicode([content], field)
    if type(id) is not int or not 0 <= id < _MAX_IDS:
        raise TokenizerError(f"{field}: id is {id!r:.80}, not an int from 0 to {_MAX_IDS - 1}")
    flags = {}
    for name, default in (
        ("single_word", False),
        ("lstrip", False),
        ("rstrip", False),
        ("normalized", not token.get("special", False)),
        ("special", False),
    ):
        flags[name] = token.get(name, default)
        if not isinstance(flags[name], bool):
            raise TokenizerError(f"{field}: {name} is {flags[name]!r:.80}, not true or false")
    return AddedToken(content, id, **flags)


def check_merges(merges: list[Any], field: str) -> list[str]:
    for i, merge in enumerate(merges):
        if type(merge) is not str or merge.count(" ") != 1:
            raise TokenizerError(f"{field} {i} is {merge!r:.80}, not two tokens")
    return merges


def check_vocab(vocab: Any, field: str) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        raise TokenizerError(f"{field} is {vocab!r:.80}, not an object that maps tokens to ids")
    ids = vocab.values()
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= _MAX_IDS:
        for token, id in vocab.items():
            if type(id) is not int or not 0 <= id < _MAX_IDS:
                raise TokenizerError(
                    f"{field}: the id of {token!r:.80} is {id!r:.80}, not an int from 0 to "
                    f"{_MAX_IDS - 1}"
                )
    if len(set(ids)) != len(vocab):
        owners: dict[int, str] = {}
        for token, id in vocab.items():
            if owners.setdefault(id, token) != token:
                raise TokenizerError(
                    f"{field}: {owners[id]!r:.80} and {token!r:.80} have the same id {id}"
                )
    _check_unicode(vocab, field)
    return vocab


def _check_unicode(tokens: Iterable[str], field: str) -> None:
    try:
        "".join(tokens).encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{field}: a token holds the lone surrogate U+{ord(error.object[error.start]):04X}, "
            "which is no character"
        ) from None


def get_field(
    content: dict[str, Any], name: str, kind: type, path: Path | str, prefix: str = ""
) -> Any:
    value = content.get(name)
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        got = "missing" if name not in content else f"{value!r:.80}"
        raise TokenizerError(f"{path}: {prefix}{name} is {got}, not {wanted}; {SUPPORTED}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds {content!r:.80}, not a JSON object")
    return content


def read_json(path: Path) -> Any:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise TokenizerError(f"{path}: the name {twice!r:.80} is there twice in one object")
        return content

    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except TokenizerError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise TokenizerError(
            f"{path} is not valid JSON ({reason:.120}); it may be cut off: fetch it again"
        ) from None


def read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise TokenizerError(
                f"{path} has {size} bytes; a tokenizer's file has {_MAX_BYTES} at most"
            )
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"{path} is not UTF-8 text (byte 0x{error.object[error.start]:02X} at offset "
            f"{error.start}); fetch it again"
        ) from None
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or error}") from None
