"""Sources of examples: a named file, the folder $GPT2FAST_DATA, the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._system.parsing import Unreadable, parse_json
from ..data.huggingface import silent_attempts
from ..data.opening import TextInput
from ..errors import DataError
from .task import ExampleT, Hub, Task


def load(task: Task[Any], given: str | os.PathLike[str] | None = None) -> tuple[str, list[Any]]:
    """Find and read a task's examples.

    Args:
        task: that needs them.
        given: the file that holds them. None looks for the task's files in $GPT2FAST_DATA, then
            on the hub.

    Returns:
        The place where they were found, and the examples.

    Raises:
        DataError: they are nowhere, or broken.
    """
    if given is not None:
        path = Path(given)
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "no file"
            raise DataError(f"{path} is {kind}: name the file with the data of task {task.name}")
        place, examples = str(path), task.read(path)
    else:
        local = _local(task)
        if local is not None:
            place, examples = str(local), task.read(local)
        elif task.hub is not None:
            place, examples = _named(task.hub), task.from_rows(_rows_of_hub(task))
        else:
            raise DataError(f"task {task.name} needs its data: {_ways_out(task)}")
    if not examples:
        raise DataError(f"{place} holds no examples for task {task.name}")
    return place, examples


def read_text(path: Path) -> str:
    """The text of a file, decompressed; in UTF-8 or with a byte order mark. Ends of lines stay as
    they are. Raises DataError that says what else the file is, or where it is damaged."""
    return TextInput(path).read_text()


class Row(dict[str, Any]):
    """An object of a file, and its place there."""

    place: str


def read_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSONL file."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except Unreadable as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: {line[:60]!r} is not a JSON object")
        placed = Row(row)
        placed.place = f"{path}, line {number}"
        yield placed


def examples_of(
    rows: Iterable[Mapping[str, Any]], make: Callable[[Mapping[str, Any]], ExampleT]
) -> list[ExampleT]:
    """The examples that `make` makes of rows. Raises DataError that says which row is wrong."""
    examples = []
    for number, row in enumerate(rows, start=1):
        try:
            examples.append(make(row))
        except DataError as error:
            raise DataError(f"{getattr(row, 'place', f'row {number}')}: {error}") from None
    return examples


def field(row: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field of a row. Raises DataError where it is missing or of another type."""
    value = row.get(name)
    if not isinstance(value, kind):
        found = f"{value!r:.60}" if name in row else f"only {', '.join(map(str, row))}"
        raise DataError(f"an example needs {name!r} ({kind.__name__}), and has {found}")
    return value


def _local(task: Task[Any]) -> Path | None:
    folder = os.environ.get("GPT2FAST_DATA")
    if not folder:
        return None
    found = (Path(folder) / name for name in task.files)
    return next((path for path in found if path.is_file()), None)


def _rows_of_hub(task: Task[Any]) -> Any:
    assert task.hub is not None
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"the data of task {task.name} are not here, and reading {_named(task.hub)} from the "
            f'hub needs an extra: pip install "gpt2fast[datasets]"; or {_ways_out(task)}'
        ) from error
    hub = task.hub
    try:
        with silent_attempts():
            return load_dataset(hub.path, hub.config, split=hub.split)
    except Exception as error:  # no network, no such data set, a full disk, a broken cache, ...
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"the data of task {task.name} are not here, and {_named(hub)} cannot be had from the "
            f"hub ({type(error).__name__}: {reason}): {_ways_out(task)}"
        ) from error


def _ways_out(task: Task[Any]) -> str:
    ways = ["give the file with --data FILE"]
    if task.files:
        ways.append(f"put {' or '.join(task.files)} into the folder $GPT2FAST_DATA")
    return ", or ".join(ways) + (f" ({task.advice})" if task.advice else "")


def _named(hub: Hub) -> str:
    config = "" if hub.config is None else f", {hub.config}"
    return f"data set {hub.path} ({hub.split}{config})"
