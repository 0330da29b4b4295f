"""Turn text into token files: `train.bin`, `val.bin`, the tokenizer and `meta.json`.

The text is read in blocks, up to three times (count, train the tokenizer, encode), so memory does
not grow with it. Everything is made in `<out>/.unfinished` and moved into place at the end,
`meta.json` last; what a killed run left there lets the next one go on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from .._system.files import atomic_write_text, sync_directory
from .._system.lock import only_process
from .._system.parsing import read_json
from ..errors import DataError, Error
from ..tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from ..tokenizer.loading import FILE_NAMES
from .detection import file_source
from .encoding import Encoded, Encoders, typecode
from .encodings import known_encoding
from .inputs import checked_weight, find_sources
from .meta import LARGEST, DataMeta, read_meta
from .sources import Source, TextFile, changed_meanwhile
from .split import TRAIN, VAL, DocumentCount, Part, Plan, Position, PositionCount, require_text
from .text import END_OF_TEXT, Cuts, Segment

Progress = Callable[[str, int, int], None]
"""Called with the stage (`count`, `tokenizer`, `encode`), bytes done and bytes in all."""

_BIN_FILES = ("train.bin", "val.bin")
_LOCK = "lock"
_SECONDS_BETWEEN_SAVES = 2.0
_BYTES_FOR_PROCESSES = 4 << 20
"""Less text than this is encoded sooner than another process has started."""
_START_OVER = "start over with --overwrite (overwrite=True)"


class OtherRunError(DataError):
    """What was interrupted in this folder is not what is asked for now."""


@dataclass(frozen=True)
class PreparedData:
    """What `prepare_data` wrote, and where."""

    directory: Path
    train_file: Path
    val_file: Path
    meta: DataMeta
    resumed: bool
    """An interrupted run was continued."""


def prepare_data(
    inputs: str | Path | Sequence[str | Path] | Mapping[str, float],
    out_dir: str | Path,
    tokenizer: Any = "char",
    vocab_size: int = 2048,
    split: str | None = None,
    val_fraction: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    *,
    dataset: str | None = None,
    dataset_config: str | None = None,
    text_field: str = "text",
    records: str | None = None,
    encoding: str | None = None,
    workers: int = 1,
    notify: Callable[[str], None] = warnings.warn,
    add_tokens: Sequence[str] = (),
) -> PreparedData:
    """Tokenize text into `out_dir`, which DataModule and `python -m gpt2fast.train` read.

    In every tokenizer an `<|endoftext|>` becomes the one end token; the newline of a line that
    holds nothing else is dropped with it.

    Args:
        inputs: text files, files of records (.jsonl or .ndjson, .json with an array of objects,
            .csv, .tsv, .parquet), each of them also compressed (gzip, bzip2, xz, zstd, zip),
            folders (their .txt and .md files, recursively, sorted; .jsonl, .ndjson and .parquet
            where there are none of these; .csv, .tsv and .json where there are no others), and "-"
            for standard input, text or JSON lines. A mapping from inputs to weights makes a
            mixture: each is a corpus of its own, of which a part is held out, and training draws
            windows from each in proportion to its weight.
        out_dir: folder that gets the token files, the tokenizer and `meta.json`.
        tokenizer: "char" (the characters of the whole text), "bpe" (a byte-level BPE trained on
            the training part only), a directory or hub name such as "gpt2", or a tokenizer; one of
            transformers or tokenizers will do.
        vocab_size: tokens of a "bpe".
        split: "position" (the default) holds out the last `val_fraction` of the characters of all
            files, one after another, as nanoGPT does. "documents" holds out whole documents, drawn
            with `seed`, until they make up `val_fraction`; a line that is just `<|endoftext|>` ends
            a document, and so does the end of a file.
        val_fraction: share that is held out; None means 0.1.
        seed: of the documents that are held out.
        overwrite: replace what `out_dir` holds, finished or not. Without it finished data are an
            error, and an interrupted run of the same call is continued.
        progress: told how far the work is.
        dataset, dataset_config: a data set of the Hugging Face hub, or a folder, instead of inputs.
            Its validation split is used as it is, unless `split` says to hold out a part of train.
        text_field: the field of JSON objects, or the column of a table, that holds the text.
        records: what a record is: "documents" (an end token follows each), or "lines" of one text.
            Default: documents; lines for WikiText.
        encoding: of text that is not in UTF-8, by Python's name, such as "cp1252". None means
            UTF-8, or what a byte order mark says.
        workers: processes that encode; the outcome does not depend on it.
        notify: told of files that are copies of each other, and of standard input that is records.
        add_tokens: special tokens that the tokenizer gets, at its end, such as "<|user|>" and
            "<|assistant|>"; where their texts stand in a text, they become these tokens. They
            count in the `vocab_size` of a "bpe".

    Returns:
        What was written: folder, numbers of tokens, tokenizer.

    Raises:
        DataError, TokenizerError: unusable input.
    """
    if split not in ("position", "documents", None):
        raise DataError(f"split is {split!r}; choose position or documents")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction}; it must lie between 0 and 1")
    if records not in ("documents", "lines", None):
        raise DataError(f"records is {records!r}; choose documents or lines")
    if workers < 1:
        raise DataError(f"workers is {workers}; it must be at least 1")
    out_dir = Path(out_dir)
    made: Tokenizer | None = None
    if isinstance(tokenizer, os.PathLike):
        tokenizer = os.fspath(tokenizer)
    elif not isinstance(tokenizer, str):
        made = Tokenizer.of(tokenizer)
        tokenizer = f"{type(made).__name__} {made.fingerprint()}"
    given: list[int] = []
    weights = None
    sources: list[Source | None]
    if dataset is not None:
        if inputs:
            raise DataError("both inputs and a data set were given; choose one")
        sources, given = _dataset(dataset, dataset_config, text_field, records, split, val_fraction)
        corpus_of = [0] * len(sources)
    else:
        if isinstance(inputs, Mapping):
            weights = {str(name): checked_weight(str(name), inputs[name]) for name in inputs}
        sources, corpus_of = find_sources(
            inputs, out_dir, text_field, records == "lines", encoding, notify
        )
    split = split or ("given" if given else "position")
    if split == "position":
        for source, corpus, following in zip(sources, corpus_of, corpus_of[1:], strict=False):
            if isinstance(source, TextFile):
                source.ends_line = corpus == following
    settings = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size if tokenizer == "bpe" else None,
        "split": split,
        "val_fraction": None if given else 0.1 if val_fraction is None else val_fraction,
        "seed": seed if split == "documents" else None,
        # None where they have always been so: an older version's interrupted run goes on.
        "text_field": None if text_field == "text" else text_field,
        "records": records,
        "encoding": known_encoding(encoding),
        "weights": weights,
        "add_tokens": list(add_tokens) or None,
    }
    with _working_directory(out_dir, overwrite) as work:
        run = _Run(
            work, sources, corpus_of, given, settings, progress or _silent, workers, notify, made
        )
        resumed = run.begin()
        run.finish(out_dir)
        meta = read_meta(out_dir / "meta.json")
    return PreparedData(out_dir, out_dir / "train.bin", out_dir / "val.bin", meta, resumed)


def _dataset(
    name: str,
    config: str | None,
    field: str,
    records: str | None,
    split: str | None,
    val_fraction: float | None,
) -> tuple[list[Source | None], list[int]]:
    """The sources of a data set, and the part that each is, unless it is to be divided."""
    from .huggingface import open_dataset

    train, val = open_dataset(name, config, field, records)
    if val is None or split is not None:
        return [train], []
    if val_fraction is not None:
        raise DataError(
            f"val_fraction is {val_fraction}, but the data set brings its own {val.name}; leave "
            "the setting out, or hold out a part of train with --split position"
        )
    return [train, val], [TRAIN, VAL]


@contextlib.contextmanager
def _working_directory(out_dir: Path, overwrite: bool) -> Iterator[Path]:
    """`out_dir/.unfinished`; it stays after an interruption, and goes after a mistake."""
    if out_dir.exists() and not out_dir.is_dir():
        raise DataError(f"{out_dir} is a file; name a directory for the output")
    work = out_dir / ".unfinished"
    made = [path for path in (out_dir, *out_dir.parents) if not path.exists()]
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out_dir} cannot be made: {error.strerror}") from None
    busy = DataError(
        f"another process is preparing data in {out_dir}; wait for it, or choose another directory"
    )
    with only_process(work / _LOCK, busy):
        if overwrite:
            _clear(work)
        run = work / "run.json"
        interrupted = run.exists()
        try:
            if not overwrite and not interrupted:
                _check_vacant(out_dir)
            yield work
        except BaseException as error:
            if not run.exists() or (isinstance(error, Error) and not interrupted):
                with contextlib.suppress(OSError):
                    _remove(work)
                with contextlib.suppress(OSError):
                    for path in made:
                        path.rmdir()
            raise


def _check_vacant(out_dir: Path) -> None:
    for name in ("meta.json", *_BIN_FILES, "tokenizer.json", "vocab.json"):
        if (out_dir / name).exists():
            raise DataError(
                f"{out_dir} already holds {name}; choose another directory, or replace it "
                "with --overwrite (overwrite=True)"
            )


def _clear(work: Path) -> None:
    # First of all: without it nothing that a kill leaves here is continued.
    (work / "run.json").unlink(missing_ok=True)
    for item in work.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name != _LOCK:
            item.unlink()


def _remove(work: Path) -> None:
    _clear(work)
    shutil.rmtree(work)


class _Run:
    """One preparation, or the rest of one, in its working directory."""

    def __init__(
        self,
        work: Path,
        sources: list[Source | None],
        corpus_of: list[int],
        given: list[int],
        settings: dict[str, Any],
        progress: Progress,
        workers: int,
        notify: Callable[[str], None],
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.work = work
        self.asked = sources
        self.corpus_of = corpus_of
        self.given = given
        self.settings = settings
        self.progress = progress
        self.workers = workers
        self.notify = notify
        self.tokenizer = tokenizer
        self.documents = settings["split"] == "documents"

    def begin(self) -> bool:
        """Start, or check that what was started is the same; True if there is work to reuse."""
        path = self.work / "run.json"
        begun: dict[str, Any] | None = None
        with contextlib.suppress(DataError):  # there is none, or a crash damaged it
            begun = read_json(path, DataError, **LARGEST)
        if begun is None or not {"names", "settings", "signatures"} <= begun.keys():
            begun = None
            _clear(self.work)
        # What comes through a pipe next time cannot be compared.
        names = [str(Path("-").resolve()) if s is None else s.identity for s in self.asked]
        if begun is not None:
            self._check_same(begun, names)
        self.sources = [self._spooled() if s is None else s for s in self.asked]
        self.names = [source.name for source in self.sources]
        self.signatures = [source.signature() for source in self.sources]
        if begun is None:
            wanted = {"settings": self.settings, "names": names, "signatures": self.signatures}
            if None not in self.asked:
                atomic_write_text(path, json.dumps(wanted))
            return False
        for name, before, now in zip(names, begun["signatures"], self.signatures, strict=True):
            if before != now:
                raise OtherRunError(
                    f"{name} has changed since the interrupted run in {self.work.parent}; "
                    f"{_START_OVER}"
                )
        return (self.work / "plan.json").exists()

    def _check_same(self, begun: dict[str, Any], names: list[str]) -> None:
        found = f"{self.work.parent} holds an interrupted run"
        if begun["names"] != names:
            raise OtherRunError(f"{found} on other files; repeat it to continue, or {_START_OVER}")
        before = begun["settings"]
        changed = [name for name, value in self.settings.items() if before.get(name) != value]
        if changed:
            told = ", ".join(f"{n} {before.get(n)!r}, now {self.settings[n]!r}" for n in changed)
            raise OtherRunError(
                f"{found} with other settings ({told}); repeat it to continue, or {_START_OVER}"
            )

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

    def finish(self, out_dir: Path) -> None:
        """Do what has not been done yet."""
        if not (self.work / "meta.json").exists():
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
        self._publish(out_dir)

    def _blocks(
        self, stage: str, cuts: Cuts, start: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[list[Segment], int, tuple[int, int]]]:
        """Yield the segments of each block, their source, and (source, place) of the next block.

        With the documents split the end of a source is a block of its own that ends a document,
        unless the last one has ended already.
        """
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

    # -- counting --------------------------------------------------------------------------------

    def _plan(self) -> Plan:
        if self.given:
            return Plan(self.corpus_of, given=self.given)
        path = self.work / "plan.json"
        if path.exists():
            # An older version wrote one boundary, not a list.
            boundaries = read_json(path, DataError).get("boundary")
            boundaries = boundaries if isinstance(boundaries, list) else [boundaries]
            if not all(type(boundary) is int for boundary in boundaries):
                raise DataError(f"{path} is damaged; {_START_OVER}")
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
        """What errors call each corpus."""
        if self.settings["weights"] is not None:
            return list(self.settings["weights"])
        return [", ".join(self.names[:3]) + (", …" if len(self.names) > 3 else "")]

    # -- tokenizer -------------------------------------------------------------------------------

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
        at = Position()
        for segments, source, _ in self._blocks("tokenizer", Cuts(any_character=True)):
            for _, text, end in plan.parts(segments, source, at):
                yield text + END_OF_TEXT if end else text

    def _training_text(self, plan: Plan) -> Iterator[str]:
        at = Position()
        for segments, source, _ in self._blocks("tokenizer", Cuts()):
            for part, text, _ in plan.parts(segments, source, at):
                if part == TRAIN:
                    yield text

    # -- encoding --------------------------------------------------------------------------------

    def _encode(self, tokenizer: Tokenizer, plan: Plan) -> Position:
        """Write train.bin and val.bin into the working directory."""
        item_size = array(typecode(tokenizer.vocab_size)).itemsize
        written = self._saved_position(item_size)
        saved = time.monotonic()
        left = sum(source.size for source in self.sources[written.source :])
        workers = self.workers if left >= _BYTES_FOR_PROCESSES else 1
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(self.work / name, "r+b")) for name in _BIN_FILES]
            for file, tokens in zip(files, written.tokens, strict=True):
                file.truncate(tokens * item_size)
                file.seek(0, os.SEEK_END)
            encoders = stack.enter_context(Encoders(tokenizer, self.work / "tokenizer", workers))
            waiting: deque[tuple[Future[Encoded], Position]] = deque()
            for parts, at in self._parts(_cuts(tokenizer), plan, written):
                waiting.append((encoders.submit(parts), at))
                while len(waiting) > encoders.waiting:
                    written = _write(*waiting.popleft(), written, files)
                    if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                        self._save_position(written, files)
                        saved = time.monotonic()
            for future, at in waiting:
                written = _write(future, at, written, files)
            self._save_position(written, files)
        return written

    def _parts(
        self, cuts: Cuts, plan: Plan, start: Position
    ) -> Iterator[tuple[list[Part], Position]]:
        """The parts of each block from `start` on, and how far the text is read after it."""
        at = replace(start, held_out=list(start.held_out))
        for segments, source, following in self._blocks("encode", cuts, (at.source, at.offset)):
            parts = list(plan.parts(segments, source, at))
            at.source, at.offset = following
            yield parts, replace(at, held_out=list(at.held_out))

    def _saved_position(self, item_size: int) -> Position:
        with contextlib.suppress(OSError, DataError, TypeError, ValueError):
            at = Position(**read_json(self.work / "position.json", DataError))
            sizes = [(self.work / name).stat().st_size for name in _BIN_FILES]
            if all(size >= n * item_size for size, n in zip(sizes, at.tokens, strict=True)):
                return at
        for name in _BIN_FILES:
            (self.work / name).write_bytes(b"")
        return Position()

    def _save_position(self, at: Position, files: Sequence[IO[bytes]]) -> None:
        # The tokens must be on the disk before a file says that they are.
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        atomic_write_text(self.work / "position.json", json.dumps(asdict(at)))

    # -- moving into place -----------------------------------------------------------------------

    def _write_meta(self, tokenizer: Tokenizer, plan: Plan, at: Position) -> None:
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
            files=sorted(["meta.json", *_BIN_FILES, *made]),
        )
        atomic_write_text(self.work / "meta.json", meta.to_json())

    def _publish(self, out_dir: Path) -> None:
        meta = read_meta(self.work / "meta.json")
        replaced = self.work / "replaced.json"
        made = [
            (path, name)
            for name in meta.files
            for path in (self.work / name, self.work / "tokenizer" / name)
            if path.exists() and name != "meta.json"
        ]
        if not made and (out_dir / "meta.json").exists():  # stopped after the last line but one
            _remove(self.work)
            return
        if (out_dir / "meta.json").exists():
            os.replace(out_dir / "meta.json", replaced)
        if replaced.exists():
            for name in _files_of(replaced):
                (out_dir / name).unlink(missing_ok=True)
            replaced.unlink()
        for path, name in made:
            os.replace(path, out_dir / name)
        sync_directory(out_dir)
        atomic_write_text(out_dir / "meta.json", meta.to_json())
        _remove(self.work)


def _write(
    encoding: Future[Encoded], at: Position, before: Position, files: Sequence[IO[bytes]]
) -> Position:
    """Append what was encoded; returns `at` with the counts of all that is written."""
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


def _cuts(tokenizer: Tokenizer) -> Cuts:
    """Where a text may be cut without a change of its tokens."""
    whole = (END_OF_TEXT, *(token.content for token in tokenizer.added_tokens))
    if isinstance(tokenizer, CharTokenizer):
        return Cuts(any_character=True, whole=whole)
    if not tokenizer.cuts_at_spaces:
        return Cuts(nowhere=True, whole=whole)
    return Cuts(before_space=tokenizer.encode("a") == tokenizer.encode(" a"), whole=whole)


def _files_of(meta: Path) -> list[str]:
    try:
        names = read_meta(meta).files
    except DataError:
        return []
    # A file that was not made here stays, whatever the other one says.
    return [name for name in names if name in (*_BIN_FILES, *FILE_NAMES)]


def _silent(stage: str, done: int, total: int) -> None:
    pass
