"""Sharded tensors in a folder, where each process writes its own (torch.distributed.checkpoint).

The folder's index is a pickle, which could run code. It is first read without creating objects, to
check it, and then loaded with only the few classes allowed that describe tensors.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..._system.files import open_file, read_file
from ..._system.pickle_check import Objection, unpickle_objects
from ...errors import ConfigError, WeightsError, shown

if TYPE_CHECKING:
    from ..distributed import Group

_CLASSES = {
    "torch": {"Size", "float32", "float16", "bfloat16", "float64", "int64", "device"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "ChunkStorageMetadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


_FILE_NAME = re.compile(r"__\d+_\d+\.distcp")
_LARGEST_INDEX = 64 << 20


def _read_index(folder: Path) -> Any:
    """The index, once it is known to hold nothing but small descriptions of tensors."""

    def check(index: Any) -> None:
        names = {entry.state["relative_path"] for entry in index.state["storage_data"].values()}
        for name in names:
            if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
                raise Objection(f"names the file {shown(name)}, which is none of a checkpoint's")
            open_file(folder / name).close()  # nothing that would be waited for

    return unpickle_objects(read_file(folder / ".metadata", _LARGEST_INDEX), _CLASSES, check)


def save_tensors(tensors: dict[str, Tensor], folder: Path, group: Group) -> None:
    """Write `tensors` of all processes as `folder`. Raises OSError where the disk refuses."""
    import torch.distributed.checkpoint as dcp

    try:
        with group.explain_lost_peer(), _no_advice():
            dcp.save(tensors, checkpoint_id=folder, no_dist=group.size == 1)
    except dcp.CheckpointException as error:
        for failure, _ in error.failures.values():  # torch takes Ctrl-C for a failure as well
            if isinstance(failure, KeyboardInterrupt):
                raise failure from None
        raise OSError(f"{folder}: {_reason(error)}") from error
    except RuntimeError as error:  # torch's error for a full disk
        raise OSError(f"{folder}: {_first_line(error)}") from error


def load_tensors(tensors: dict[str, Tensor], folder: Path, group: Group) -> None:
    """Read the named tensors in place, each process its own part.

    Raises:
        ConfigError: one is missing or has another shape.
        WeightsError: the folder is damaged.
    """
    import torch.distributed.checkpoint as dcp

    reader = _reader(folder)
    found = _index(reader, folder)
    for name, tensor in tensors.items():
        saved = found.get(name)
        if saved is None or saved.size != tensor.shape:
            there = "nothing" if saved is None else f"shape {tuple(saved.size)}"
            raise ConfigError(
                f"optimizer state {name} in {folder}: expected shape {tuple(tensor.shape)}, found "
                f"{there}; the checkpoint belongs to another model or optimizer"
            )
    try:
        with group.explain_lost_peer(), _no_advice():
            dcp.load(tensors, storage_reader=reader, no_dist=group.size == 1)
    except (dcp.CheckpointException, RuntimeError, OSError, EOFError, AssertionError) as error:
        raise _damaged(folder, _reason(error)) from None


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        """Reads the index with the allowed classes only."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            index = _read_index(folder)
            index.storage_meta = StorageMeta(load_id=self.load_id)
            return index

    return Reader(folder)


def _index(reader: Any, folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        found = reader.read_metadata().state_dict_metadata
        strangers = [n for n, m in found.items() if not isinstance(m, TensorStorageMetadata)]
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError,
            ImportError, pickle.UnpicklingError) as error:  # fmt: skip
        raise _damaged(folder, _first_line(error)) from None
    if strangers:
        raise _damaged(folder, f"{strangers[0]} is not a tensor")
    return found


def _damaged(folder: Path, reason: str) -> WeightsError:
    return WeightsError(
        f"{folder} cannot be read: {reason}. It is damaged, cut short or not the state of an "
        "optimizer; name an older checkpoint: --resume PATH"
    )


def _reason(error: BaseException) -> str:
    """The error of the first process that failed, without torch's wrapper."""
    failures = getattr(error, "failures", None)
    if failures:
        inner = next(iter(failures.values()))
        return _first_line(inner[0] if isinstance(inner, tuple) else inner)
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _no_advice() -> Iterator[None]:
    """Hide torch's warnings about a single process and its device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
