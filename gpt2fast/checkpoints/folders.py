"""A model's folder: the names of its files, and the one that holds the weights."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from .._system.files import read_file
from ..config import CONFIG_FILE
from ..errors import WeightsError
from ..tokenizer.nanogpt import CHECKPOINT
from .foreign_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, explain_adapter, explain_folder
from .generation_config import NAME as GENERATION_CONFIG
from .hub import resolve
from .tensor_files import file_kind
from .tensor_names import listed

WEIGHTS = "model.safetensors"
"""The file that this package and transformers write."""

_SAFETENSORS = (WEIGHTS, f"{WEIGHTS}.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", CHECKPOINT)
# An adapter's too, so that a hub repository that has only an adapter can be explained.
_DESCRIPTIONS = (CONFIG_FILE, GENERATION_CONFIG, ADAPTER_CONFIG)
# Two rounds, so that a model on the hub that has both is not downloaded twice.
_DOWNLOADS = (
    (*_DESCRIPTIONS, *_SAFETENSORS, "model-*.safetensors"),
    (*_DESCRIPTIONS, *_PICKLES, "pytorch_model-*.bin"),
)


def find_weights(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The file that holds the weights, or the index of the files that do; downloaded if need be.

    Raises:
        WeightsError: nothing found, or in a format that is not read.
    """
    file = _find(name_or_path, revision, local_files_only)
    file_kind(file)
    return file


def _find(
    name_or_path: str | os.PathLike[str], revision: str | None, local_files_only: bool
) -> Path:
    for patterns in _DOWNLOADS:
        path = resolve(
            name_or_path,
            revision=revision,
            local_files_only=local_files_only,
            allow_patterns=patterns,
        )
        if not path.is_dir():
            if path.name in ADAPTER_WEIGHTS and (path.parent / ADAPTER_CONFIG).is_file():
                raise WeightsError(f"{path} is {explain_adapter(path.parent)}")
            return path
        for name in patterns:
            if name not in _DESCRIPTIONS and (path / name).is_file():
                return path / name
    checkpoint = _tensorflow_index(path)
    if checkpoint is not None:
        return checkpoint
    held = sorted(entry.name for entry in path.iterdir())
    what = explain_folder(path, held)
    if what is not None:
        raise WeightsError(f"{path} is {what}")
    raise WeightsError(
        f"{path} has no weights: none of {', '.join(_SAFETENSORS + _PICKLES)} is there, "
        f"only {listed(held) or 'nothing'}; give the path of the file that holds the weights"
    )


def _tensorflow_index(folder: Path) -> Path | None:
    """The index of the TensorFlow checkpoint in a folder, the newest if it has several."""
    found = sorted(folder.glob("*.index"))
    if len(found) < 2:
        return found[0] if found else None
    # TensorFlow writes down which it wrote last: model_checkpoint_path: "model-1000"
    latest = ""
    with suppress(OSError):
        content = read_file(folder / "checkpoint", 1 << 20).decode("utf-8", "replace")
        match = re.search(r'^model_checkpoint_path: "([^"]*)"', content, re.MULTILINE)
        latest = os.path.basename(match[1]) + ".index" if match else ""
    for index in found:
        if index.name == latest:
            return index
    raise WeightsError(
        f"{folder} has several TensorFlow checkpoints ({listed([index.name for index in found])}); "
        "give the path of one of these files"
    )
