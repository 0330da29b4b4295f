"""Children's Book Test (Hill et al., 2015): which of ten words was left out of a sentence.

Each candidate is put in its place, and the likelihood is that of the candidate with the rest of
the sentence after it (Radford et al., 2019, section 3.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .sources import examples_of, field, read_rows, read_text
from .task import Choice, ChoiceTask, Hub

_BLANK = "XXXXX"
_BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}"}
_RULES = (
    (r"(?:``|(?<!\S)`) ?", "“"),
    (r" ?''", "”"),
    (r" (n't|'(?:s|S|m|re|ve|ll|d))(?!\w)", r"\1"),
    (r" ([.,;:!?%)\]}])", r"\1"),
    (r"([(\[{$]) ", r"\1"),
    (r" '(?!\w)", "'"),
)


class CommonNouns(ChoiceTask):
    """Common nouns."""

    name = "cbt_cn"
    about = "Children's Book Test, common nouns, test: accuracy"
    files = ("CBTest/data/cbtest_CN_test_2500ex.txt", "cbtest_CN_test_2500ex.txt")
    hub = Hub("cam-cst/cbt", "CN", "test")
    metrics = ("acc",)
    published = {"acc": (0.8765, 0.9235, 0.9345, 0.9330)}
    difference = "the paper does not give its detokenizer."

    def read(self, path: Path) -> list[Choice]:
        """The original's text (20 numbered sentences and a question), or the hub's rows as JSONL.

        A question ends in tabs: the answer, nothing, and the candidates with | between them.
        """
        if path.suffix == ".jsonl":
            return self.from_rows(read_rows(path))
        choices: list[Choice] = []
        sentences: list[str] = []
        for number, line in enumerate(read_text(path).replace("\r\n", "\n").split("\n"), start=1):
            _, _, rest = line.strip().partition(" ")
            if not line.strip():
                sentences = []
            elif "\t" not in rest:
                sentences.append(rest)
            else:
                question, *answer = rest.split("\t")
                if len(answer) != 3:
                    raise DataError(
                        f"{path}, line {number}: a question is sentence, answer, nothing and "
                        f"candidates with tabs between, not {len(answer) + 1} parts"
                    )
                try:
                    choice = _choice(sentences, question, answer[0], answer[2].split("|"))
                except DataError as error:
                    raise DataError(f"{path}, line {number}: {error}") from None
                choices.append(choice)
                sentences = []
        return choices

    def from_rows(self, rows: Iterable[Mapping[str, Any]]) -> list[Choice]:
        """Same as `Task.from_rows`."""
        return examples_of(rows, _choice_of_row)


class NamedEntities(CommonNouns):
    """Named entities."""

    name = "cbt_ne"
    about = "Children's Book Test, named entities, test: accuracy"
    files = ("CBTest/data/cbtest_NE_test_2500ex.txt", "cbtest_NE_test_2500ex.txt")
    hub = Hub("cam-cst/cbt", "NE", "test")
    published = {"acc": (0.834, 0.871, 0.880, 0.8905)}


def detokenize(text: str) -> str:
    """Text as it would have been typed, from the tokens of Stanford CoreNLP."""
    for token, bracket in _BRACKETS.items():
        text = text.replace(token, bracket)
    for pattern, new in _RULES:
        text = re.sub(pattern, new, text)
    return text.replace("“", '"').replace("”", '"')


def _choice_of_row(row: Mapping[str, Any]) -> Choice:
    return _choice(
        field(row, "sentences", list),
        field(row, "question", str),
        field(row, "answer", str),
        field(row, "options", list),
    )


def _choice(sentences: list[str], question: str, answer: str, options: list[str]) -> Choice:
    if question.count(_BLANK) != 1:
        raise DataError(f"a question has no single {_BLANK}: {question[:80]!r}")
    if answer not in options:
        raise DataError(f"the answer {answer!r} is not among the candidates {options!r:.120}")
    context, _, rest = detokenize(" ".join([*sentences, question])).partition(_BLANK)
    bare = context.rstrip(" ")
    space = context[len(bare) :]
    return Choice(bare, [space + option + rest for option in options], options.index(answer))
