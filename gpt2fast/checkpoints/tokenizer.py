"""The tokenizer of a checkpoint, wherever that is; tokenizers themselves know no checkpoints.

nanoGPT keeps its characters with the data, and a checkpoint names the data set that it was trained
on: data/NAME/meta.pkl, in the folder above the checkpoint's or in the current one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import MissingTokenizerError, WeightsError
from ..tokenizer import Tokenizer
from ..tokenizer.loading import FILE_NAMES, load
from ..tokenizer.nanogpt import CHECKPOINT, load_nanogpt
from ..tokenizer.nanogpt import NAME as META
from .hub import resolve

_DATA_SET = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


def load_tokenizer(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Tokenizer:
    """The tokenizer of a folder or of a model's name; see `Tokenizer.from_pretrained`."""
    path = resolve(
        str(name_or_path),
        revision=revision,
        local_files_only=local_files_only,
        allow_patterns=FILE_NAMES,
    )
    try:
        return load(path)
    except MissingTokenizerError:
        directory = path if path.is_dir() else path.parent
        name = _data_set(directory / CHECKPOINT if path.is_dir() else path)
        if name is not None:
            for base in (directory / "..", Path()):
                meta = base / "data" / name / META
                if meta.is_file():
                    return load_nanogpt(meta)
        raise


def _data_set(checkpoint: Path) -> str | None:
    """The name of the data set that nanoGPT trained a checkpoint on, if it says one."""
    if checkpoint.suffix != ".pt" or not checkpoint.is_file():
        return None
    from .tensor_files import read_torch  # torch, which preparing data does without

    try:
        content = read_torch(checkpoint)
    except WeightsError:
        return None  # whoever loads the weights says what is wrong with them
    settings = content.get("config") if isinstance(content, dict) else None
    name = settings.get("dataset") if isinstance(settings, dict) else None
    return name if isinstance(name, str) and _DATA_SET.fullmatch(name) else None
