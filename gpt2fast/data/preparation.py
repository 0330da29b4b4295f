"""Text into token files: which part is held out, the tokenizer, then the tokens.

The text is read in blocks, up to three times (count, train the tokenizer, encode), so memory does
not grow with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from .._system.files import atomic_write_text
from .._system.parsing import read_json
from ..errors import DataError
from ..tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from .detection import file_source
from .encoders import Encoded, Encoders, typecode
from .meta import BIN_FILES, META, DataMeta
from .sources import Source, changed_meanwhile
from .split import TRAIN, VAL, DocumentCount, Part, Plan, PositionCount, TextPosition, require_text
from .text import END_OF_TEXT, Cuts, Segment
from .working_folder import RUN, START_OVER, OtherRunError, begun_before

Progress = Callable[[str, int, int], None]
"""Called with the stage (`count`, `tokenizer`, `encode`), bytes done and bytes in all."""


@dataclass(frozen=True)
class Pace:
    """The amounts that are worked on at a time; the tokens do not depend on them."""

    block_size: int = 1 << 20
    """Bytes or characters that are read at a time."""
    seconds_between_saves: float = 2.0
    bytes_for_processes: int = 4 << 20
    """Less text than this is encoded sooner than another process has started."""


PACE = Pace()


@dataclass
class Preparation:
    """One preparation, or the rest of one, in its working folder."""

    work: Path
    asked: list[Source | None]
    """The sources to read, in order; None is standard input."""
    corpus_of: list[int]
    """The corpus (0, 1, …) of each source."""
    given: list[int]
    """TRAIN or VAL for each source, where the data set divides itself."""
    settings: dict[str, Any]
    """An interrupted run must have the same ones to be continued."""
    progress: Progress
    workers: int
    """Processes that encode."""
    notify: Callable[[str], None]
    tokenizer: Tokenizer | None = None
    """Taken as it is; None makes or loads the one that the settings name."""

    @property
    def documents(self) -> bool:
        """Whole documents are held out."""
        return self.settings["split"] == "documents"

    def begin(self) -> bool:
        """Start, or check that what was started is the same; True if there is work to reuse."""
        # A pipe's text cannot be compared with that of an earlier run.
        names = [str(Path("-").resolve()) if s is None else s.identity for s in self.asked]
        asked: dict[str, Any] = {"settings": self.settings, "names": names}
        begun = begun_before(self.work, asked)
        self.sources = [self._spooled() if s is None else s for s in self.asked]
        self.names = [source.name for source in self.sources]
        self.signatures = [source.signature() for source in self.sources]
        if begun is None:
            if None not in self.asked:
                told = json.dumps({**asked, "signatures": self.signatures})
                atomic_write_text(self.work / RUN, told)
            return False
        for name, before, now in zip(names, begun["signatures"], self.signatures, strict=True):
            if before != now:
                raise OtherRunError(
                    f"{name} has changed since the interrupted run in {self.work.parent}; "
                    f"{START_OVER}"
                )
        return (self.work / "plan.json").exists()

    def _spooled(self) -> Source:
        # The text is needed more than once, and a pipe can be read only once.
        path = self.work / "stdin"
        if sys.stdin is None:
            raise DataError("standard input (-) is closed; pipe the text in")
        with open(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        field = self.settings["text_field"] or "text"
        lines = self.settings["records"] == "lines"
        encoding = self.settings["encoding"]
        return file_source(path, field, lines, encoding, "-", self.notify)

    def finish(self) -> None:
        """Do the steps that are not done yet."""
        if not (self.work / META).exists():
            name = self.settings["tokenizer"]
            if name not in ("char", "bpe"):  # a wrong name is told before a long text is read
                tokenizer = self._kept(
                    lambda: self._grown(self.tokenizer or Tokenizer.from_pretrained(name))
                )
            plan = self._plan()
            if name in ("char", "bpe"):
                tokenizer = self._kept(lambda: self._grown(self._trained(plan)))
            position = self._encode(tokenizer, plan)
            for source, before in zip(self.sources, self.signatures, strict=True):
                if source.signature() != before:
                    raise changed_meanwhile(source.name)
            self._write_meta(tokenizer, plan, position)

    def _blocks(
        self, stage: str, cuts: Cuts, start: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[list[Segment], int, tuple[int, int]]]:
        """Yield the segments of each block, their source, and (source, place) of the next block.

        With the documents split the end of a source is a block of its own that ends a document,
        unless the last one has ended already.
        """
        cuts = cuts._replace(block_size=PACE.block_size)
        total = sum(source.size for source in self.sources)
        first, place = start
        for index in range(first, len(self.sources)):
            source = self.sources[index]
            before = sum(earlier.size for earlier in self.sources[:index])
            for segments, end in source.blocks(cuts, place):
                yield segments, index, (index, end)
                self.progress(stage, before + source.done, total)
            if self.documents and source.ends_document:
                yield [Segment("", True, True)], index, (index + 1, 0)
            place = 0

    def _plan(self) -> Plan:
        if self.given:
            return Plan(self.corpus_of, given=self.given)
        path = self.work / "plan.json"
        if path.exists():
            # An older version wrote one boundary, not a list.
            boundaries = read_json(path, DataError).get("boundary")
            boundaries = boundaries if isinstance(boundaries, list) else [boundaries]
            if not all(type(boundary) is int for boundary in boundaries):
                raise DataError(f"{path} is damaged; {START_OVER}")
            return Plan(self.corpus_of, boundaries, (self.work / "assignment").read_bytes())
        corpora = self._corpora()
        count = (DocumentCount if self.documents else PositionCount)(len(corpora))
        for segments, source, _ in self._blocks("count", Cuts(any_character=True)):
            count.add(segments, self.corpus_of[source])
        fraction, boundaries, assignment = self.settings["val_fraction"], [], b""
        if isinstance(count, DocumentCount):
            assignment = count.assignment(fraction, self.settings["seed"], corpora)
        else:
            boundaries = count.boundaries(fraction, corpora)
        (self.work / "assignment").write_bytes(assignment)
        atomic_write_text(path, json.dumps({"boundary": boundaries}))
        return Plan(self.corpus_of, boundaries, assignment)

    def _corpora(self) -> list[str]:
        """Names of the corpora, for messages."""
        if self.settings["weights"] is not None:
            return list(self.settings["weights"])
        return [", ".join(self.names[:3]) + (", …" if len(self.names) > 3 else "")]

    def _kept(self, make: Callable[[], Tokenizer]) -> Tokenizer:
        """The tokenizer in the working directory, made and written there if there is none."""
        directory = self.work / "tokenizer"
        if not directory.exists():
            unfinished = self.work / "tokenizer.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make().save_pretrained(unfinished)
            os.replace(unfinished, directory)
        return Tokenizer.from_pretrained(str(directory))

    def _trained(self, plan: Plan) -> Tokenizer:
        if self.settings["tokenizer"] == "char":
            return CharTokenizer.train(self._all_text(plan))
        added = len(self.settings["add_tokens"] or ())
        return BPETokenizer.train(self._training_text(plan), self.settings["vocab_size"] - added)

    def _grown(self, tokenizer: Tokenizer) -> Tokenizer:
        added = self.settings["add_tokens"]
        return tokenizer if added is None else tokenizer.with_tokens(added)

    def _all_text(self, plan: Plan) -> Iterator[str]:
        at = TextPosition()
        for segments, source, _ in self._blocks("tokenizer", Cuts(any_character=True)):
            for _, text, end in plan.parts(segments, source, at):
                yield text + END_OF_TEXT if end else text

    def _training_text(self, plan: Plan) -> Iterator[str]:
        at = TextPosition()
        for segments, source, _ in self._blocks("tokenizer", Cuts()):
            for part, text, _ in plan.parts(segments, source, at):
                if part == TRAIN:
                    yield text

    def _encode(self, tokenizer: Tokenizer, plan: Plan) -> TextPosition:
        """Write train.bin and val.bin into the working directory."""
        item_size = array(typecode(tokenizer.vocab_size)).itemsize
        written = self._saved_position(item_size)
        saved = time.monotonic()
        left = sum(source.size for source in self.sources[written.source :])
        workers = self.workers if left >= PACE.bytes_for_processes else 1
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(self.work / name, "r+b")) for name in BIN_FILES]
            for file, tokens in zip(files, written.tokens, strict=True):
                file.truncate(tokens * item_size)
                file.seek(0, os.SEEK_END)
            encoders = stack.enter_context(Encoders(tokenizer, self.work / "tokenizer", workers))
            waiting: deque[tuple[Future[Encoded], TextPosition]] = deque()
            for parts, at in self._parts(cuts_for(tokenizer), plan, written):
                waiting.append((encoders.submit(parts), at))
                while len(waiting) > encoders.waiting:
                    written = _write(*waiting.popleft(), written, files)
                    if time.monotonic() - saved > PACE.seconds_between_saves:
                        self._save_position(written, files)
                        saved = time.monotonic()
            for future, at in waiting:
                written = _write(future, at, written, files)
            self._save_position(written, files)
        return written

    def _parts(
        self, cuts: Cuts, plan: Plan, start: TextPosition
    ) -> Iterator[tuple[list[Part], TextPosition]]:
        """The parts of each block from `start` on, and how far the text is read after it."""
        at = replace(start, held_out=list(start.held_out))
        for segments, source, following in self._blocks("encode", cuts, (at.source, at.offset)):
            parts = list(plan.parts(segments, source, at))
            at.source, at.offset = following
            yield parts, replace(at, held_out=list(at.held_out))

    def _saved_position(self, item_size: int) -> TextPosition:
        with contextlib.suppress(OSError, DataError, TypeError, ValueError):
            at = TextPosition(**read_json(self.work / "position.json", DataError))
            sizes = [(self.work / name).stat().st_size for name in BIN_FILES]
            if all(size >= n * item_size for size, n in zip(sizes, at.tokens, strict=True)):
                return at
        for name in BIN_FILES:
            (self.work / name).write_bytes(b"")
        return TextPosition()

    def _save_position(self, at: TextPosition, files: Sequence[IO[bytes]]) -> None:
        # The tokens must be on the disk before a file says that they are.
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        atomic_write_text(self.work / "position.json", json.dumps(asdict(at)))

    def _write_meta(self, tokenizer: Tokenizer, plan: Plan, at: TextPosition) -> None:
        for part, name in enumerate(("training", "validation")):
            require_text(at.tokens[part], f"{name} part of {self._corpora()[0]}")
        made = [path.name for path in (self.work / "tokenizer").iterdir()]
        documents = corpora = None
        if self.documents:
            documents = {
                "train": plan.assignment.count(TRAIN),
                "val": plan.assignment.count(VAL),
                "held_out": at.held_out,
            }
        if self.settings["weights"] is not None:
            corpora = [
                {"name": name, "weight": weight, "train_tokens": train, "val_tokens": val}
                for (name, weight), (train, val) in zip(
                    self.settings["weights"].items(), at.corpus_tokens, strict=True
                )
            ]
        meta = DataMeta(
            dtype="uint16" if typecode(tokenizer.vocab_size) == "H" else "uint32",
            vocab_size=tokenizer.vocab_size,
            train_tokens=at.tokens[TRAIN],
            val_tokens=at.tokens[VAL],
            train_characters=at.characters[TRAIN],
            val_characters=at.characters[VAL],
            tokenizer="char" if isinstance(tokenizer, CharTokenizer) else "bpe",
            tokenizer_fingerprint=tokenizer.fingerprint(),
            eos_token_id=tokenizer.eos_token_id,
            split=self.settings["split"],
            val_fraction=self.settings["val_fraction"],
            seed=self.settings["seed"],
            asked_vocab_size=self.settings["vocab_size"],
            documents=documents,
            corpora=corpora,
            sources=self.names,
            files=sorted([META, *BIN_FILES, *made]),
        )
        atomic_write_text(self.work / META, meta.to_json())


def _write(
    encoding: Future[Encoded], at: TextPosition, before: TextPosition, files: Sequence[IO[bytes]]
) -> TextPosition:
    """Append encoded tokens; returns `at` with the counts of all that is written."""
    data, tokens, characters = encoding.result()
    for file, piece in zip(files, data, strict=True):
        file.write(piece)
    begun = [*before.corpus_tokens]
    begun += [[0, 0] for _ in range(at.corpus + 1 - len(begun))]
    begun[at.corpus] = _sums(begun[at.corpus], tokens)
    return replace(
        at,
        tokens=_sums(before.tokens, tokens),
        characters=_sums(before.characters, characters),
        corpus_tokens=begun,
    )


def _sums(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)]


def cuts_for(tokenizer: Tokenizer) -> Cuts:
    """The places at which a cut changes no token."""
    whole = (END_OF_TEXT, *(token.content for token in tokenizer.added_tokens))
    if isinstance(tokenizer, CharTokenizer):
        return Cuts(any_character=True, whole=whole)
    if not tokenizer.cuts_at_spaces:
        return Cuts(nowhere=True, whole=whole)
    return Cuts(before_space=tokenizer.encode("a") == tokenizer.encode(" a"), whole=whole)
