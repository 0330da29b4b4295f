"""nanoGPT's meta.pkl, the characters of a data set: {"stoi": {"a": 0}, "itos": {0: "a"}}.

It lies with the data, or beside a checkpoint. Nothing in it is run (`pickle_check`).
https://github.com/karpathy/nanoGPT/blob/master/data/shakespeare_char/prepare.py
"""

from __future__ import annotations

import io
from pathlib import Path

from .._system.parsing import read_bytes
from .._system.pickle_check import unpickle
from ..errors import TokenizerError, reason_of, shown
from .char import CharTokenizer

NAME = "meta.pkl"
CHECKPOINT = "ckpt.pt"
"""nanoGPT's name of a model, whose data has the tokenizer."""

_LARGEST = 8 << 20
_MOST_STEPS = 1_500_000  # eight a character


def load_nanogpt(path: Path) -> CharTokenizer:
    """The tokenizer of the file.

    Raises:
        TokenizerError: it cannot be read, or holds something else.
    """
    data = read_bytes(path, TokenizerError, _LARGEST)
    try:
        content = unpickle(io.BytesIO(data), {}, most_steps=_MOST_STEPS)
    except Exception as error:  # a damaged pickle fails in any way it likes
        raise TokenizerError(
            f"{path} is not nanoGPT's list of characters, and was not opened: it "
            f"{reason_of(error, 200)}"
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
    return CharTokenizer.of_characters(ids, str(path))
