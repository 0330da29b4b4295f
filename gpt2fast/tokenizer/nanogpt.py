"""nanoGPT's meta.pkl, the characters of a data set: {"stoi": {"a": 0}, "itos": {0: "a"}}.

It lies with the data; a checkpoint names the data set that it was trained on. Nothing in it is run
(`pickle_check`). https://github.com/karpathy/nanoGPT/blob/master/data/shakespeare_char/prepare.py
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from .._system.files import read_file
from .._system.pickle_check import unpickle
from ..errors import TokenizerError, WeightsError, shown

NAME = "meta.pkl"

_LARGEST = 8 << 20
_MOST_STEPS = 1_500_000  # eight a character
_DATA_SET = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


def find_meta(checkpoint: Path) -> Path | None:
    """The meta.pkl of a checkpoint, or of a folder of data: beside it, or where nanoGPT keeps it.

    That is data/NAME/meta.pkl, from the folder above the checkpoint's or from the current one, NAME
    being the data set that the checkpoint says it was trained on.
    """
    directory = checkpoint if checkpoint.is_dir() else checkpoint.parent
    file = directory / "ckpt.pt" if checkpoint.is_dir() else checkpoint
    places = [directory / NAME]
    name = _data_set(file) if file.suffix == ".pt" and file.is_file() else None
    if name is not None:
        places += [base / "data" / name / NAME for base in (directory / "..", Path())]
    return next((place for place in places if place.is_file()), None)


def read_meta(path: Path) -> dict[str, int]:
    """Character to id.

    Raises:
        TokenizerError: it cannot be read, or holds something else.
    """
    try:
        content = unpickle(io.BytesIO(read_file(path, _LARGEST)), {}, most_steps=_MOST_STEPS)
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle fails in any way it likes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise TokenizerError(
            f"{path} is not nanoGPT's list of characters, and was not opened: it {reason}"
        ) from None
    found = content if isinstance(content, dict) else {}
    characters, ids = found.get("itos"), found.get("stoi")
    if not isinstance(ids, dict) or not ids:
        raise TokenizerError(
            f"{path} names no characters: it holds {shown(sorted(map(str, found)))}, and needs "
            "stoi and itos, as nanoGPT's data/shakespeare_char/prepare.py writes them"
        )
    for character, id in ids.items():
        if type(character) is not str or type(id) is not int:
            raise TokenizerError(
                f"{path}: stoi has {shown(id)} for {shown(character)}, not an id for a character"
            )
    listed = dict(enumerate(characters)) if isinstance(characters, list) else characters
    if listed is not None and listed != {id: character for character, id in ids.items()}:
        raise TokenizerError(f"{path}: stoi and itos contradict each other")
    if found.get("vocab_size", len(ids)) != len(ids):
        raise TokenizerError(
            f"{path}: vocab_size is {shown(found['vocab_size'])}, but there are {len(ids)} "
            "characters"
        )
    return ids


def _data_set(checkpoint: Path) -> str | None:
    from ..checkpoints.tensor_files import read_torch

    try:
        content: Any = read_torch(checkpoint)
    except WeightsError:
        return None  # whoever loads the weights says what is wrong with them
    settings = content.get("config") if isinstance(content, dict) else None
    name = settings.get("dataset") if isinstance(settings, dict) else None
    return name if isinstance(name, str) and _DATA_SET.fullmatch(name) else None
