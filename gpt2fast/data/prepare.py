"""Turn text into token files: `train.bin`, `val.bin`, the tokenizer and `meta.json`.

The text is read in blocks, up to three times (count, train the tokenizer, encode), so memory does
not grow with it. Everything is made in `<out>/.unfinished` and moved into place at the end,
`meta.json` last; what a killed run left there lets the next one go on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import DataError, Error
from ..files import atomic_write_text, sync_directory
from ..lock import only_process
from ..tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from .meta import DataMeta, read_meta
from .text import END_OF_TEXT, Cuts, Segment, read_blocks

TEXT_SUFFIXES = (".txt", ".md")
OUTPUT_MARKS = ("meta.json", "config.json", "tokenizer.json")
"""A folder that holds one of these is prepared data, a model or a tokenizer, not text."""
HELD_OUT_NAMED = 1000
"""meta.json names at most so many held-out documents."""

Progress = Callable[[str, int, int], None]
"""Called with the stage (`count`, `tokenizer`, `encode`), bytes done and bytes in all."""

_TRAIN, _VAL, _BLANK = 0, 1, 2
_BIN_FILES = ("train.bin", "val.bin")
_LOCK = "lock"
_SECONDS_BETWEEN_SAVES = 2.0
_START_OVER = "start over with --overwrite (overwrite=True)"


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
    inputs: str | Path | Sequence[str | Path],
    out_dir: str | Path,
    tokenizer: str = "char",
    vocab_size: int = 2048,
    split: str = "position",
    val_fraction: float = 0.1,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PreparedData:
    """Tokenize text into `out_dir`, which DataModule and `python -m gpt2fast.train` read.

    inputs: UTF-8 files, folders (their .txt and .md files, recursively, sorted), and "-" for
        standard input.
    tokenizer: "char" (the characters of the whole text), "bpe" (a byte-level BPE of `vocab_size`
        tokens trained on the training part only), or a directory or hub name such as "gpt2".
    split: "position" holds out the last `val_fraction` of the characters of all files, one after
        another, as nanoGPT does. "documents" holds out whole documents, drawn with `seed`, until
        they make up `val_fraction`; a line that is just `<|endoftext|>` ends a document, and so
        does the end of a file.
    overwrite: replace what `out_dir` holds, finished or not. Without it finished data are an
        error, and an interrupted run of the same call is continued.

    In every tokenizer an `<|endoftext|>` becomes the one end token; the newline of a line that
    holds nothing else is dropped with it. Raises DataError or TokenizerError for unusable input.
    """
    if split not in ("position", "documents"):
        raise DataError(f"split is {split!r}; choose position or documents")
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction}; it must lie between 0 and 1")
    out_dir = Path(out_dir)
    settings = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size if tokenizer == "bpe" else None,
        "split": split,
        "val_fraction": val_fraction,
        "seed": seed if split == "documents" else None,
    }
    files = _find_files(inputs, out_dir)
    with _working_directory(out_dir, overwrite) as work:
        run = _Run(work, files, settings, progress or _silent)
        resumed = run.begin()
        run.finish(out_dir)
        meta = read_meta(out_dir / "meta.json")
    return PreparedData(out_dir, out_dir / "train.bin", out_dir / "val.bin", meta, resumed)


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
                shutil.rmtree(work, ignore_errors=True)
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
    for item in work.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name != _LOCK:
            item.unlink()


@dataclass
class _Position:
    """How far a pass over the text has come; enough to go on from there."""

    source: int = 0
    offset: int = 0
    """Bytes read of that source."""
    character: int = 0
    """Characters read so far; with the documents split, of the current held-out document."""
    document: int = 0
    head: str = ""
    """How the current document begins, if it is held out."""
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    characters: list[int] = field(default_factory=lambda: [0, 0])
    held_out: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    """Which part of the text goes into which split; the outcome of counting."""

    boundary: int
    """Position split: so many characters train."""
    assignment: bytes
    """Documents split: _TRAIN, _VAL or _BLANK for each document."""

    def parts(self, segments: list[Segment], at: _Position) -> Iterator[tuple[int, str, bool]]:
        """Yield (_TRAIN or _VAL, text, end token follows) and move `at` along."""
        if self.assignment:
            yield from self._by_document(segments, at)
            return
        for text, separator, _ in segments:
            room = max(0, self.boundary - at.character)
            at.character += len(text) + separator
            if room > len(text):
                yield _TRAIN, text, separator
                continue
            if room:
                yield _TRAIN, text[:room], False
            if separator or room < len(text):
                yield _VAL, text[room:], separator

    def _by_document(
        self, segments: list[Segment], at: _Position
    ) -> Iterator[tuple[int, str, bool]]:
        for text, separator, ends_document in segments:
            if at.document == len(self.assignment):
                raise _changed_meanwhile("the text")
            part = self.assignment[at.document]
            if part != _BLANK:
                yield part, text, separator
            if part == _VAL:
                at.head = (at.head + text)[:400]
                at.character += len(text) + separator
            if not ends_document:
                continue
            if part == _VAL and len(at.held_out) < HELD_OUT_NAMED:
                named = {"document": at.document, "title": _title(at.head)}
                at.held_out.append({**named, "characters": at.character})
            at.head, at.character = "", 0
            at.document += 1


class _Run:
    """One preparation, or the rest of one, in its working directory."""

    def __init__(
        self, work: Path, files: list[Path], settings: dict[str, Any], progress: Progress
    ) -> None:
        self.work = work
        self.files = files
        self.settings = settings
        self.progress = progress
        self.documents = settings["split"] == "documents"

    def begin(self) -> bool:
        """Start, or check that what was started is the same; True if there is work to reuse."""
        path = self.work / "run.json"
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            begun = None
        if begun is None:
            _clear(self.work)
        piped = Path("-") in self.files
        names = [str(file.resolve()) for file in self.files]
        if begun is not None:
            self._check_same(begun, names)
        self.names = ["-" if file == Path("-") else file.name for file in self.files]
        self.files = [self._spooled() if file == Path("-") else file for file in self.files]
        self.signatures = [_signature(file) for file in self.files]
        if begun is None:
            wanted = {"settings": self.settings, "names": names, "signatures": self.signatures}
            if not piped:  # what comes through a pipe next time cannot be compared
                atomic_write_text(path, json.dumps(wanted))
            return False
        for name, before, now in zip(names, begun["signatures"], self.signatures, strict=True):
            if before != now:
                raise DataError(
                    f"{name} has changed since the interrupted run in {self.work.parent}; "
                    f"{_START_OVER}"
                )
        return (self.work / "plan.json").exists()

    def _check_same(self, begun: dict[str, Any], names: list[str]) -> None:
        found = f"{self.work.parent} holds an interrupted run"
        if begun["names"] != names:
            raise DataError(f"{found} on other files; repeat it to continue, or {_START_OVER}")
        before = begun["settings"]
        changed = [name for name, value in self.settings.items() if before.get(name) != value]
        if changed:
            told = ", ".join(f"{n} {before.get(n)!r}, now {self.settings[n]!r}" for n in changed)
            raise DataError(
                f"{found} with other settings ({told}); repeat it to continue, or {_START_OVER}"
            )

    def _spooled(self) -> Path:
        # The text is needed more than once, and a pipe can be read only once.
        path = self.work / "stdin"
        with open(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        return path

    def finish(self, out_dir: Path) -> None:
        """Do what has not been done yet."""
        if not (self.work / "meta.json").exists():
            name = self.settings["tokenizer"]
            if name not in ("char", "bpe"):  # a wrong name is told before a long text is read
                tokenizer = self._kept(lambda: Tokenizer.from_pretrained(name))
            plan = self._plan()
            if name in ("char", "bpe"):
                tokenizer = self._kept(lambda: self._trained(plan))
            position = self._encode(tokenizer, plan)
            for file, before in zip(self.files, self.signatures, strict=True):
                if _signature(file) != before:
                    raise _changed_meanwhile(file)
            self._write_meta(tokenizer, plan, position)
        self._publish(out_dir)

    def _blocks(
        self, stage: str, cuts: Cuts, start: tuple[int, int] = (0, 0)
    ) -> Iterator[tuple[list[Segment], tuple[int, int]]]:
        """Yield the segments of each block, and (source, byte) where the next one starts.

        With the documents split the end of a file is a block of its own that ends a document.
        """
        sizes = [signature["size"] for signature in self.signatures]
        source, offset = start
        for index in range(source, len(self.files)):
            done = sum(sizes[:index])
            path = self.files[index]
            for segments, end in read_blocks(path, cuts, offset):
                if end > sizes[index]:
                    raise _changed_meanwhile(path)
                yield segments, (index, end)
                self.progress(stage, done + end, sum(sizes))
            if self.documents:
                yield [Segment("", True, True)], (index + 1, 0)
            offset = 0

    # -- counting --------------------------------------------------------------------------------

    def _plan(self) -> _Plan:
        path = self.work / "plan.json"
        if path.exists():
            boundary = json.loads(path.read_text(encoding="utf-8"))["boundary"]
            return _Plan(boundary, (self.work / "assignment").read_bytes())
        plan = self._plan_documents() if self.documents else self._plan_position()
        (self.work / "assignment").write_bytes(plan.assignment)
        atomic_write_text(path, json.dumps({"boundary": plan.boundary}))
        return plan

    def _plan_position(self) -> _Plan:
        characters = 0
        for segments, _ in self._blocks("count", Cuts(any_character=True)):
            characters += sum(len(text) + separator for text, separator, _ in segments)
        self._check_not_empty(characters)
        fraction = self.settings["val_fraction"]
        boundary = int(characters * (1 - fraction))
        if not 0 < boundary < characters:
            part = "training" if boundary == 0 else "validation"
            raise DataError(
                f"the {part} part would be empty: val_fraction is {fraction} of {characters} "
                "characters; give more text or another --val-fraction"
            )
        return _Plan(boundary, b"")

    def _plan_documents(self) -> _Plan:
        lengths = array("q")  # nothing else grows with the text: eight bytes a document
        length, blank = 0, True
        for segments, _ in self._blocks("count", Cuts(any_character=True)):
            for text, separator, ends_document in segments:
                length += len(text) + separator
                blank = blank and not text.strip()
                if ends_document:
                    lengths.append(0 if blank else length)
                    length, blank = 0, True
        characters = sum(lengths)
        self._check_not_empty(characters)
        if sum(map(bool, lengths)) < 2:
            raise DataError(
                "there is only one document, so none can be held out; end documents with a line "
                f"{END_OF_TEXT}, give several files, or use --split position"
            )
        assignment = bytearray(_TRAIN if length else _BLANK for length in lengths)
        target = self.settings["val_fraction"] * characters
        for index in _hold_out(lengths, target, self.settings["seed"]):
            assignment[index] = _VAL
        return _Plan(0, bytes(assignment))

    def _check_not_empty(self, characters: int) -> None:
        if not characters:
            names = ", ".join(self.names[:3]) + (", …" if len(self.names) > 3 else "")
            raise DataError(f"there is no text in the input ({names})")

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

    def _trained(self, plan: _Plan) -> Tokenizer:
        if self.settings["tokenizer"] == "char":
            return CharTokenizer.train(self._all_text(plan))
        return BPETokenizer.train(self._training_text(plan), self.settings["vocab_size"])

    def _all_text(self, plan: _Plan) -> Iterator[str]:
        at = _Position()
        for segments, _ in self._blocks("tokenizer", Cuts(any_character=True)):
            for _, text, end in plan.parts(segments, at):
                yield text + END_OF_TEXT if end else text

    def _training_text(self, plan: _Plan) -> Iterator[str]:
        at = _Position()
        for segments, _ in self._blocks("tokenizer", Cuts()):
            for part, text, _ in plan.parts(segments, at):
                if part == _TRAIN:
                    yield text

    # -- encoding --------------------------------------------------------------------------------

    def _encode(self, tokenizer: Tokenizer, plan: _Plan) -> _Position:
        """Write train.bin and val.bin into the working directory."""
        typecode = _typecode(tokenizer.vocab_size)
        item_size = array(typecode).itemsize
        at = self._saved_position(item_size)
        saved = time.monotonic()
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(self.work / name, "r+b")) for name in _BIN_FILES]
            for file, tokens in zip(files, at.tokens, strict=True):
                file.truncate(tokens * item_size)
                file.seek(0, os.SEEK_END)
            start = (at.source, at.offset)
            for segments, following in self._blocks("encode", _cuts(tokenizer), start):
                for part, text, end in plan.parts(segments, at):
                    ids = tokenizer.encode(text)
                    if end:
                        ids = [*ids, _end_token(tokenizer)]
                    files[part].write(_to_bytes(typecode, ids))
                    at.tokens[part] += len(ids)
                    at.characters[part] += len(text) + end
                at.source, at.offset = following
                if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                    self._save_position(at, files)
                    saved = time.monotonic()
            self._save_position(at, files)
        return at

    def _saved_position(self, item_size: int) -> _Position:
        with contextlib.suppress(FileNotFoundError):
            at = _Position(**json.loads((self.work / "position.json").read_text(encoding="utf-8")))
            sizes = [(self.work / name).stat().st_size for name in _BIN_FILES]
            if all(size >= n * item_size for size, n in zip(sizes, at.tokens, strict=True)):
                return at
        for name in _BIN_FILES:
            (self.work / name).write_bytes(b"")
        return _Position()

    def _save_position(self, at: _Position, files: Sequence[IO[bytes]]) -> None:
        # The tokens must be on the disk before a file says that they are.
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        atomic_write_text(self.work / "position.json", json.dumps(asdict(at)))

    # -- moving into place -----------------------------------------------------------------------

    def _write_meta(self, tokenizer: Tokenizer, plan: _Plan, at: _Position) -> None:
        made = [path.name for path in (self.work / "tokenizer").iterdir()]
        documents = None
        if self.documents:
            documents = {
                "train": plan.assignment.count(_TRAIN),
                "val": plan.assignment.count(_VAL),
                "held_out": at.held_out,
            }
        meta = DataMeta(
            dtype="uint16" if _typecode(tokenizer.vocab_size) == "H" else "uint32",
            vocab_size=tokenizer.vocab_size,
            train_tokens=at.tokens[_TRAIN],
            val_tokens=at.tokens[_VAL],
            train_characters=at.characters[_TRAIN],
            val_characters=at.characters[_VAL],
            tokenizer="char" if isinstance(tokenizer, CharTokenizer) else "bpe",
            tokenizer_fingerprint=tokenizer.fingerprint(),
            eos_token_id=tokenizer.eos_token_id,
            split=self.settings["split"],
            val_fraction=self.settings["val_fraction"],
            seed=self.settings["seed"],
            asked_vocab_size=self.settings["vocab_size"],
            documents=documents,
            sources=self.names,
            files=sorted(["meta.json", *_BIN_FILES, *made]),
        )
        atomic_write_text(self.work / "meta.json", meta.to_json())

    def _publish(self, out_dir: Path) -> None:
        meta = read_meta(self.work / "meta.json")
        replaced = self.work / "replaced.json"
        if (out_dir / "meta.json").exists():
            os.replace(out_dir / "meta.json", replaced)
        if replaced.exists():
            for name in _files_of(replaced):
                (out_dir / name).unlink(missing_ok=True)
            replaced.unlink()
        for name in meta.files:
            for path in (self.work / name, self.work / "tokenizer" / name):
                if path.exists() and name != "meta.json":
                    os.replace(path, out_dir / name)
        sync_directory(out_dir)
        atomic_write_text(out_dir / "meta.json", meta.to_json())
        shutil.rmtree(self.work)


def _find_files(inputs: str | Path | Sequence[str | Path], out_dir: Path) -> list[Path]:
    """The files to read, in order; "-" stays as it is."""
    found: list[Path] = []
    for item in [inputs] if isinstance(inputs, (str, Path)) else inputs:
        path = Path(item)
        if str(item) == "-" or path.is_file():
            found.append(path)
        elif path.is_dir():
            files = _text_files(path, out_dir)
            if not files:
                raise DataError(
                    f"{path} holds no {' or '.join(TEXT_SUFFIXES)} files (in folders without "
                    f"{', '.join(OUTPUT_MARKS[:-1])} or {OUTPUT_MARKS[-1]}, which hold data or "
                    "models, not text); name the text file"
                )
            found += files
        elif path.exists():
            raise DataError(f"{path} is neither a file nor a folder; pipe it in and give - instead")
        else:
            raise DataError(f"{path} does not exist")
    if not found:
        raise DataError("no input was given; name a text file, a folder, or - for standard input")
    if found.count(Path("-")) > 1:
        raise DataError("standard input (-) was given more than once")
    return found


def _text_files(folder: Path, out_dir: Path) -> list[Path]:
    """Text files below `folder`, sorted; nothing hidden, nothing that this module wrote."""
    files = []
    for directory, folders, names in os.walk(folder):
        here = Path(directory)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and (here / name).resolve() != out_dir.resolve()
        ]
        if any(mark in names for mark in OUTPUT_MARKS):
            continue
        files += [
            here / name
            for name in names
            if name.lower().endswith(TEXT_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(files)


def _signature(path: Path) -> dict[str, Any]:
    """What tells whether a file is still the same, without reading all of it."""
    edge = 1 << 16
    digest = hashlib.sha256()
    try:
        stat = path.stat()
        with open(path, "rb") as file:
            digest.update(file.read(edge))
            file.seek(max(0, stat.st_size - edge))
            digest.update(file.read(edge))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    return {
        "size": stat.st_size,
        "modified_ns": stat.st_mtime_ns,
        "sha256_of_ends": digest.hexdigest(),
    }


def _hold_out(lengths: Sequence[int], target: float, seed: int) -> list[int]:
    """Documents in an order drawn with `seed`, until they hold `target` characters."""
    order = array("q", (index for index, length in enumerate(lengths) if length))
    # Of Python's generators only random() and this seeding are promised to stay as they are.
    draw = random.Random(str(seed)).random
    chosen: list[int] = []
    total = 0
    for place in range(len(order) - 1):  # one document at least must train
        other = place + int(draw() * (len(order) - place))
        order[place], order[other] = order[other], order[place]
        length = lengths[order[place]]
        # A document much longer than what is still missing would distort the fraction.
        if total + length <= 1.1 * target:
            chosen.append(order[place])
            total += length
        if total >= target:
            break
    return chosen or [min(order, key=lambda index: lengths[index])]


def _title(head: str) -> str:
    """The first line that says something."""
    return next((line.strip(" \t#") for line in head.split("\n") if line.strip()), "")[:100]


def _cuts(tokenizer: Tokenizer) -> Cuts:
    """Where a text may be cut without a change of its tokens."""
    whole = (END_OF_TEXT, *(token.content for token in tokenizer.added_tokens))
    if isinstance(tokenizer, CharTokenizer):
        return Cuts(any_character=True, whole=whole)
    return Cuts(before_space=tokenizer.encode("a") == tokenizer.encode(" a"), whole=whole)


def _changed_meanwhile(what: str | Path) -> DataError:
    return DataError(f"{what} has changed while it was being read; {_START_OVER}")


def _end_token(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"documents end with {END_OF_TEXT}, but the tokenizer has no end token; use a "
            "tokenizer that has one, or --split position on a text without such lines"
        )
    return tokenizer.eos_token_id


def _typecode(vocab_size: int) -> str:
    return "H" if vocab_size <= 1 << 16 else "I"


def _to_bytes(typecode: str, ids: list[int]) -> bytes:
    tokens = array(typecode, ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tobytes()


def _files_of(meta: Path) -> list[str]:
    try:
        names = read_meta(meta).files
    except DataError:
        return []
    return [name for name in names if isinstance(name, str) and Path(name).name == name]


def _silent(stage: str, done: int, total: int) -> None:
    pass
