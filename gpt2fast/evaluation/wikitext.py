"""WikiText-2 and WikiText-103 (Merity et al., 2016), raw.

The text is tokenized (`He had a role @-@ a small one .`); the model reads it with the marks of
that undone, and the likelihood is divided by the words of the original, so that models with
different tokens can be compared (Radford et al., 2019, section 3.1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..errors import DataError
from .perplexity import plain
from .sources import examples_of, field, read_text
from .task import Cut, Document, Hub, TextTask

_REPLACED = (
    (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."),
    (" : ", ": "), (" ; ", "; "), (" . ", ". "), (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
)  # fmt: skip
_ENCLOSED = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
_REST = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="),
    (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
)  # fmt: skip


def detokenize(page: str) -> str:
    """The page as it would have been typed: the rules of lm-evaluation-harness, in its order."""
    page = page.replace("s '", "s'")
    for old, new in _REPLACED:
        page = page.replace(old, new)
    for pattern, new in _ENCLOSED:
        page = re.sub(pattern, new, page)
    for old, new in _REST:
        page = page.replace(old, new)
    return page


def read_wikitext(path: Path) -> str:
    """The text of a file, which must have the headings of WikiText. Raises DataError."""
    text = read_text(path).replace("\r\n", "\n")
    if text.strip() and not any(map(_is_heading, text.split("\n"))):
        raise DataError(
            f"{path} has no heading (` = Title = `) as WikiText has them: it is some other text, "
            "which task perplexity scores"
        )
    return text


def _is_heading(line: str) -> bool:
    line = line.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


def pages(text: str) -> Iterator[str]:
    """The articles of a WikiText file, each from its heading (` = Title = `) on."""
    lines: list[str] = []
    for line in text.split("\n"):
        if _is_heading(line):
            if "".join(lines).strip():
                yield "\n".join(lines)
            lines = []
        lines.append(line)
    yield "\n".join(lines)


class WikiText2(TextTask):
    """Each article on its own, as in lm-evaluation-harness.

    Units, all of the original text:

    - original_token: words, and one <eos> at the end of each line, as WikiText counts
      (245,569 in the test set).
    - word: pieces that `re.split(r"\\s+")` gives, empty ones at the ends included, as
      lm-evaluation-harness counts.
    - byte: of UTF-8.
    """

    name = "wikitext2"
    about = "WikiText-2, test: perplexity per original token and per word, bits per byte"
    files: ClassVar[tuple[str, ...]] = ("wikitext-2-raw/wiki.test.raw", "wiki.test.raw")
    hub = Hub("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test")
    metrics = {
        "perplexity": "original_token",
        "token_perplexity": "token",
        "word_perplexity": "word",
        "byte_perplexity": "byte",
        "bits_per_byte": "byte",
    }
    published = {"perplexity": (29.41, 22.76, 19.93, 18.34)}
    difference = (
        "the paper does not give its detokenizer nor its windows; its figure lies nearer to what "
        "others measure per GPT-2 token than per word. A smaller --stride lowers ours."
    )

    def read(self, path: Path) -> list[Document]:
        """Same as `Task.read`."""
        text = read_wikitext(path)
        if not text.strip():
            return []
        found = list(pages(text))
        # Every page but the last lost the newline that ends it, the first what stands before it.
        lines = [page.count("\n") + 1 for page in found]
        lines[-1] -= 1
        lines[0] += text.count("\n") - sum(lines)
        return [_document(*pair) for pair in zip(found, lines, strict=True)]

    def from_rows(self, rows: Iterable[Mapping[str, Any]]) -> list[Document]:
        """Same as `Task.from_rows`."""
        texts = examples_of(rows, lambda row: field(row, "page", str))
        return [_document(page, lines=page.count("\n") + 1) for page in texts]


class WikiText103(WikiText2):
    """The task of WikiText-2 on the text of WikiText-103."""

    name = "wikitext103"
    about = "WikiText-103, test: as wikitext2"
    files = ("wikitext-103-raw/wiki.test.raw",)
    hub = Hub("EleutherAI/wikitext_document_level", "wikitext-103-raw-v1", "test")
    published = {"perplexity": (37.50, 26.37, 22.05, 17.48)}
    difference = (
        "the paper does not give its detokenizer nor its windows. A smaller --stride lowers ours."
    )


class WikiText2Joined(TextTask):
    """WikiText-2 as transformers' guide to perplexity reads it: one text, as it is.

    The rows of the hub's data set, where an empty line is "", joined by two newlines.
    """

    name = "wikitext2_joined"
    about = "WikiText-2, test, as in transformers' guide: use --stride 512 or 1024"
    files = WikiText2.files
    hub = Hub("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    metrics = {"token_perplexity": "token", "word_perplexity": "word", "bits_per_byte": "byte"}
    first_token = False

    def read(self, path: Path) -> list[Document]:
        """Same as `Task.read`."""
        lines = read_wikitext(path).split("\n")
        if not lines[-1]:
            lines.pop()
        return [_joined(line + "\n" if line.strip() else "" for line in lines)]

    def from_rows(self, rows: Iterable[Mapping[str, Any]]) -> list[Document]:
        """Same as `Task.from_rows`."""
        return [_joined(examples_of(rows, lambda row: field(row, "text", str)))]

    def shorten(self, documents: Sequence[Document], count: int, cut: Cut) -> Sequence[Document]:
        """Same as `Perplexity.shorten`."""
        return [plain(cut(document.text)) for document in documents]


def _document(page: str, lines: int) -> Document:
    return Document(
        detokenize(page),
        {
            "original_token": len(page.split()) + lines,
            "word": len(re.split(r"\s+", page)),
            "byte": len(page.encode()),
        },
    )


def _joined(rows: Iterable[str]) -> Document:
    return plain("\n\n".join(rows))
