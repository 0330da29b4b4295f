"""HellaSwag (Zellers et al., 2019): which of four endings continues a scene."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .sources import examples_of, field, read_rows, read_text
from .task import Choice, ChoiceTask, Hub


class HellaSwag(ChoiceTask):
    """The validation set (the test set has no answers), completion style: `ChoiceTask`."""

    name = "hellaswag"
    about = "HellaSwag, validation: accuracy, plain and by characters"
    files = (
        "hellaswag_val.jsonl",
        "hellaswag_val_full.txt",
        "hellaswag_val_full.txt.bz2",
    )
    hub = Hub("Rowan/hellaswag", None, "validation")

    def read(self, path: Path) -> list[Choice]:
        """The original's JSONL, or text with six lines an example: context, index, four endings.

        The text is taken as it is, since its author has prepared it. The version that is commonly
        shared does not capitalize the second sentence as lm-evaluation-harness does.
        """
        if path.name.removesuffix(path.suffix).endswith(".txt") or path.suffix == ".txt":
            return _from_text(path)
        return self.from_rows(read_rows(path))

    def from_rows(self, rows: Iterable[Mapping[str, Any]]) -> list[Choice]:
        """Same as `Task.from_rows`; prepared as lm-evaluation-harness does."""
        return examples_of(rows, _choice)


def prepare(text: str) -> str:
    """Without WikiHow's markers: "[title]" begins a sentence, other brackets go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _choice(row: Mapping[str, Any]) -> Choice:
    first, second = field(row, "ctx_a", str), field(row, "ctx_b", str)
    context = f"{field(row, 'activity_label', str)}: {first} {second.capitalize()}"
    endings = [" " + prepare(ending) for ending in field(row, "endings", list)]
    if not all(ending.strip() for ending in endings):
        raise DataError("one of the endings is empty")
    label = row.get("label")
    if not str(label).isdigit() or int(str(label)) >= len(endings):
        raise DataError(
            f"the label of an example is {label!r}; it must be one of its {len(endings)} endings "
            "(the test set has no labels: take the validation set)"
        )
    return Choice(prepare(context), endings, int(str(label)))


def _from_text(path: Path) -> list[Choice]:
    lines = read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n")
    if len(lines) % 6:
        raise DataError(
            f"{path} has {len(lines)} lines, which is no multiple of six (context, index of the "
            "right ending, four endings)"
        )
    choices = []
    for first in range(0, len(lines), 6):
        context, gold, *endings = lines[first : first + 6]
        if gold.strip() not in ("0", "1", "2", "3"):
            raise DataError(
                f"{path}, line {first + 2}: {gold[:60]!r} is not the index of an ending, 0 to 3"
            )
        choices.append(Choice(context.strip(), [" " + end.strip() for end in endings], int(gold)))
    return choices
