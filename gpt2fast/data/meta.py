"""meta.json: what a directory of prepared data says about itself."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .._system.parsing import is_file_name, read_json_value
from ..errors import DataError, shown

META = "meta.json"
BIN_FILES = ("train.bin", "val.bin")
"""Token files of prepared data; the files of its tokenizer lie beside them."""

DEFAULT_VOCAB_SIZE = 2048
"""Tokens of a BPE tokenizer that is trained with the data, if nothing else is said."""

FORMAT = 1
LARGEST = {"largest": 64 << 20, "most_values": 2_000_000}
"""Limits for reading meta.json, which names all sources: there may be a hundred thousand."""
ITEM_SIZE = {"uint16": 2, "uint32": 4}


@dataclass(frozen=True)
class DataMeta:
    """Facts about prepared data; `train.bin` and `val.bin` are raw little-endian token arrays."""

    dtype: str
    """`uint16` or `uint32`."""
    vocab_size: int | None
    """Number of token ids, special ones included; None where the data do not say."""
    train_tokens: int
    val_tokens: int
    train_characters: int | None
    """Unicode characters behind the tokens; an `<|endoftext|>` counts as one."""
    val_characters: int | None
    tokenizer: str | None
    """`char` or `bpe`; None where the data do not say."""
    tokenizer_fingerprint: str | None
    eos_token_id: int | None
    split: str | None
    """`position`, `documents`, or `given`: the data set brought its own validation split."""
    val_fraction: float | None = None
    seed: int | None = None
    asked_vocab_size: int | None = None
    """Size asked for a `bpe` trained on the text; too short a text gives a smaller one."""
    documents: dict[str, Any] | None = None
    """With `split` = `documents`: the numbers of documents, and the ones held out."""
    corpora: list[dict[str, Any]] | None = None
    """In a mixture: `name`, `weight`, `train_tokens` and `val_tokens` of each corpus, in the order
    in which they follow one another in the files."""
    sources: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    """All files that belong to the prepared data."""

    def characters_per_token(self, split: str = "val") -> float | None:
        """Divide a loss in nats per token by this to get nats per character."""
        tokens = self.val_tokens if split == "val" else self.train_tokens
        characters = self.val_characters if split == "val" else self.train_characters
        return characters / tokens if characters and tokens else None

    def to_json(self) -> str:
        """The text of `meta.json`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"


def _types() -> dict[str, tuple[type, ...]]:
    """The types that each field of `DataMeta` may have in a file."""
    types = {}
    for name, hint in get_type_hints(DataMeta).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        plain = tuple(get_origin(kind) or kind for kind in kinds)
        types[name] = (*plain, int) if float in plain else plain
    return types


def read_meta(path: Path) -> DataMeta:
    """Read a meta.json. Raises DataError that names the file, the field and the value."""
    again = "Prepare the data again with `python -m gpt2fast.prepare`"
    try:
        values = read_json_value(path, DataError, **LARGEST)
    except DataError as error:
        raise DataError(f"{error}. {again}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise DataError(f"{path}: format is {shown(found)}, this version reads {FORMAT}. {again}")
    types = _types()
    kept = {name: value for name, value in values.items() if name in types}
    for name, value in kept.items():
        if not isinstance(value, types[name]) or isinstance(value, bool):
            raise DataError(f"{path}: {name} is {shown(value)}, of the wrong type. {again}")
        if isinstance(value, int) and not (0 <= value < 1 << 63 or name == "seed"):
            raise DataError(f"{path}: {name} is {shown(value)}, not from 0 to 2^63 - 1. {again}")
    missing = [n for n in list(types)[:10] if n not in kept]
    if missing:
        raise DataError(f"{path}: {', '.join(missing)} missing. {again}")
    if kept["dtype"] not in ITEM_SIZE:
        raise DataError(f"{path}: dtype is {shown(kept['dtype'])}, not uint16 or uint32. {again}")
    for name in ("sources", "files"):
        if not all(isinstance(item, str) for item in kept.get(name, ())):
            raise DataError(f"{path}: {name} is {shown(kept[name])}, not a list of names. {again}")
    for item in kept.get("files", ()):
        # Files are moved and replaced by these names: none may lead out of the folder.
        if not is_file_name(item):
            raise DataError(f"{path}: {shown(item)} among files is no file's name. {again}")
    meta = DataMeta(**kept)
    _check_corpora(path, meta, again)
    return meta


def _check_corpora(path: Path, meta: DataMeta, again: str) -> None:
    if meta.corpora is None:
        return
    fine = bool(meta.corpora)
    for corpus in meta.corpora:
        fine = fine and isinstance(corpus, dict) and isinstance(corpus.get("name"), str)
        fine = fine and type(corpus.get("weight")) in (int, float)
        fine = fine and 0 < corpus["weight"] <= sys.float_info.max
        for split in ("train", "val"):
            count = corpus.get(f"{split}_tokens") if fine else None
            fine = type(count) is int and count >= 0
    if fine:
        for split in ("train", "val"):
            told = sum(corpus[f"{split}_tokens"] for corpus in meta.corpora)
            fine = fine and told == getattr(meta, f"{split}_tokens")
    if not fine:
        raise DataError(f"{path}: corpora does not fit the rest of the file. {again}")
