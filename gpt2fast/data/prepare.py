"""Turn text into token files: `train.bin`, `val.bin`, the tokenizer and `meta.json`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..tokenizer import Tokenizer
from .charsets import known_encoding
from .inputs import checked_weight, find_sources
from .meta import BIN_FILES, DEFAULT_VOCAB_SIZE, META, DataMeta, read_meta
from .preparation import Preparation, Progress
from .sources import Source, TextFile
from .split import TRAIN, VAL
from .working_folder import publish, working_folder


@dataclass(frozen=True)
class PreparedData:
    """The data that `prepare_data` wrote, and their folder."""

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
    vocab_size: int = DEFAULT_VOCAB_SIZE,
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
    with working_folder(out_dir, overwrite) as work:
        tell = progress or (lambda *_: None)
        preparation = Preparation(
            work, sources, corpus_of, given, settings, tell, workers, notify, made
        )
        resumed = preparation.begin()
        preparation.finish()
        publish(work, out_dir)
        meta = read_meta(out_dir / META)
    train_file, val_file = (out_dir / name for name in BIN_FILES)
    return PreparedData(out_dir, train_file, val_file, meta, resumed)


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
