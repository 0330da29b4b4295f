"""Reading a tokenizer's files, and the checks that turn broken ones into one clear error."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .._system import parsing
from ..errors import TokenizerError, shown
from .added_tokens import FLAGS, AddedToken

SUPPORTED = "supported is GPT-2's byte-level BPE"

_MAX_BYTES = 64 << 20
# Half again as many as 580,000 merges, each a list of two, and 260,000 tokens have.
_MAX_VALUES = 3_000_000
MOST_IDS = 1 << 24


def added_token(token: Any, id: Any, field: str) -> AddedToken:
    if not isinstance(token, dict):
        raise TokenizerError(f"{field} is {shown(token)}, not an object")
    content = token.get("content")
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"{field}: content is {shown(content)}, not a string with characters")
    _check_unicode([content], field)
    if type(id) is not int or not 0 <= id < MOST_IDS:
        raise TokenizerError(f"{field}: id is {shown(id)}, not an int from 0 to {MOST_IDS - 1}")
    flags = {}
    for name in FLAGS:
        default = name == "normalized" and not token.get("special", False)
        flags[name] = token.get(name, default)
        if not isinstance(flags[name], bool):
            raise TokenizerError(f"{field}: {name} is {shown(flags[name])}, not true or false")
    return AddedToken(content, id, **flags)


def check_merges(merges: list[Any], field: str) -> list[str]:
    for i, merge in enumerate(merges):
        if type(merge) is not str or merge.count(" ") != 1:
            raise TokenizerError(f"{field} {i} is {shown(merge)}, not two tokens")
    return merges


def check_vocab(vocab: Any, field: str) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        raise TokenizerError(f"{field} is {shown(vocab)}, not an object that maps tokens to ids")
    ids = vocab.values()
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= MOST_IDS:
        for token, id in vocab.items():
            if type(id) is not int or not 0 <= id < MOST_IDS:
                raise TokenizerError(
                    f"{field}: the id of {shown(token)} is {shown(id)}, not an int from 0 to "
                    f"{MOST_IDS - 1}"
                )
    if len(set(ids)) != len(vocab):
        owners: dict[int, str] = {}
        for token, id in vocab.items():
            if owners.setdefault(id, token) != token:
                raise TokenizerError(
                    f"{field}: {shown(owners[id])} and {shown(token)} have the same id {id}"
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
        got = "missing" if name not in content else f"{shown(value)}"
        raise TokenizerError(f"{path}: {prefix}{name} is {got}, not {wanted}; {SUPPORTED}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    return parsing.read_json(path, TokenizerError, _MAX_BYTES, _MAX_VALUES)


def read_json(path: Path) -> Any:
    return parsing.read_json_value(path, TokenizerError, _MAX_BYTES, _MAX_VALUES)


def read_text(path: Path) -> str:
    return parsing.read_text(path, TokenizerError, _MAX_BYTES)
