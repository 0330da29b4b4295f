"""Turn text into token files: `gpt2fast prepare book.txt`."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .._system.invocation import command_line
from .._system.output import StatusLine, complain, note, say
from ..data.charsets import known_encoding
from ..data.inputs import parse_weights
from ..data.meta import DEFAULT_VOCAB_SIZE
from ..data.opening import COMPRESSED_SUFFIXES
from ..errors import Error
from .arguments import CommandParser, text_argument
from .command import command

EXAMPLES = """\
examples:
  gpt2fast prepare book.txt
      characters as tokens, the last 10 % held out, into data/book
  gpt2fast prepare books/ --tokenizer bpe --vocab-size 2048 --split documents
      a byte-level BPE of its own; whole files (or documents) held out
  gpt2fast prepare notes.txt --tokenizer gpt2 --out data/notes
      GPT-2's own tokenizer, to fine-tune it
  gpt2fast prepare big.txt.gz
      text compressed by gzip, bzip2, xz, zstd or zip
  curl -s https://example.org/book.txt | gpt2fast prepare - --out data/book
  gpt2fast prepare web.jsonl.gz --text-field content --tokenizer gpt2
      JSON lines, a JSON array, .csv, .tsv or .parquet: each record is a document
  gpt2fast prepare neko.txt --encoding shift_jis
  gpt2fast prepare books.txt=0.7 web.jsonl=0.3 --tokenizer gpt2 --out data/mix
      a mixture: training draws 70 % of its windows from the books
  gpt2fast prepare chat.txt --tokenizer gpt2 --add-tokens '<|user|>' '<|assistant|>'
      GPT-2's tokenizer with tokens more, which training gives embeddings
  gpt2fast prepare --dataset wikitext --dataset-config wikitext-2-raw-v1 --tokenizer gpt2
      a data set of the Hugging Face hub, or a folder made with save_to_disk

A folder stands for its .txt and .md files, at any depth, in alphabetical order; for its .jsonl,
.ndjson and .parquet files where it has none of these, else for its .csv, .tsv and .json files. A
line that is just <|endoftext|> ends a document and becomes one token. An interrupted command
continues when it is given again. Text must be UTF-8, or UTF-16 or UTF-32 with a byte order mark,
unless --encoding names another encoding."""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "prepare",
        description="Turn text into train.bin, val.bin, a tokenizer and meta.json for training.",
        epilog=EXAMPLES,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "inputs", nargs="*", metavar="INPUT",
        help="file of text or of records (.jsonl, .json, .csv, .tsv, .parquet), compressed or not, "
        "folder, or - for standard input; INPUT=WEIGHT makes a mixture",
    )  # fmt: skip
    add("--dataset", metavar="NAME", help="Hugging Face data set (hub name or folder) instead")
    add("--dataset-config", metavar="NAME", help="its configuration, such as wikitext-2-raw-v1")
    add(
        "--text-field", type=text_argument, default="text", metavar="NAME",
        help="field or column that holds the text of a record (default: text)",
    )  # fmt: skip
    add(
        "--records", choices=("documents", "lines"),
        help="a record is a document that an end token follows, or a line of one text (default: "
        "documents; lines for wikitext)",
    )  # fmt: skip
    add("--encoding", metavar="NAME", help="of the text, where it is not UTF-8: cp1252, gb18030, …")
    add(
        "--tokenizer", default="char", metavar="NAME",
        help="char, bpe (trained on the training part of this text), gpt2, or another directory "
        "or hub name (default: char)",
    )  # fmt: skip
    add(
        "--add-tokens", nargs="+", default=[], action="extend", metavar="TOKEN",
        help="special tokens that the tokenizer gets, such as '<|user|>' '<|assistant|>'",
    )  # fmt: skip
    add("--out", metavar="DIR", help="where to write (default: data/<name of INPUT>)")
    add(
        "--vocab-size", type=int, metavar="N",
        help=f"tokens of a bpe tokenizer (default: {DEFAULT_VOCAB_SIZE})",
    )  # fmt: skip
    add(
        "--split", choices=("position", "documents"),
        help="hold out the end of the text, or whole documents drawn by chance (default: "
        "the data set's own validation split, else position)",
    )  # fmt: skip
    add(
        "--val-fraction", type=float, metavar="F",
        help="part of the characters held out for validation (default: 0.1)",
    )  # fmt: skip
    add("--seed", type=int, metavar="N", help="which documents are held out (default: 0)")
    add(
        "--workers", type=int, metavar="N",
        help="processes that encode; the outcome is the same (default: one for each core)",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace what DIR holds, finished or not")
    return parser


@command()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args, inputs = _parse(argv)
    try:
        return _prepare(args, inputs)
    except KeyboardInterrupt:
        again = "" if "-" in args.inputs else "; give the same command again to continue"
        again += " (without --overwrite)" if again and args.overwrite else ""
        complain(f"interrupted{again}")
        return 130


def _parse(
    argv: Sequence[str] | None,
) -> tuple[argparse.Namespace, list[str] | dict[str, float]]:
    """The arguments, and the inputs with their weights if they have any."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.vocab_size is not None and args.tokenizer != "bpe":
        parser.error(f"--vocab-size is for --tokenizer bpe, not {args.tokenizer}")
    if args.out == "":
        parser.error("--out is empty; name a folder, such as data/book")
    if args.seed is not None and args.split != "documents":
        parser.error("--seed chooses the documents to hold out; it needs --split documents")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        parser.error(f"--val-fraction {args.val_fraction}: it must lie between 0 and 1")
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers is {args.workers}, but must be at least 1")
    if not args.inputs and args.dataset is None:
        last = args.add_tokens[-1:]
        swallowed = f" ({last[0]!r} was taken for one of --add-tokens)" if last else ""
        parser.error(f"no INPUT was given; name a text file or folder, or a --dataset{swallowed}")
    if args.inputs and args.dataset is not None:
        parser.error(f"both {args.inputs[0]} and --dataset {args.dataset} were given; choose one")
    if args.dataset_config is not None and args.dataset is None:
        parser.error("--dataset-config chooses a part of a --dataset; name that, too")
    if args.inputs.count("-") > 1:
        parser.error("standard input (-) was given more than once")
    if args.vocab_size is not None and args.vocab_size < 257:
        parser.error(
            f"--vocab-size is {args.vocab_size}; a bpe needs 257, the bytes and <|endoftext|>"
        )
    try:
        known_encoding(args.encoding)
        return args, parse_weights(args.inputs)
    except Error as error:
        parser.error(str(error))


def _prepare(args: argparse.Namespace, inputs: list[str] | dict[str, float]) -> int:
    from ..data.encoders import available_cores
    from ..data.prepare import prepare_data

    if "-" in args.inputs and sys.stdin is not None and sys.stdin.isatty():
        complain("reading the text from the terminal; Ctrl-D ends it")
    started = time.monotonic()
    progress = _Progress()
    prepared = prepare_data(
        inputs,
        Path(args.out or f"data/{_default_name(args.dataset or next(iter(inputs)))}"),
        tokenizer=args.tokenizer,
        vocab_size=DEFAULT_VOCAB_SIZE if args.vocab_size is None else args.vocab_size,
        split=args.split,
        val_fraction=args.val_fraction,
        seed=args.seed or 0,
        overwrite=args.overwrite,
        progress=progress,
        dataset=args.dataset,
        dataset_config=args.dataset_config,
        text_field=args.text_field,
        records=args.records,
        encoding=args.encoding,
        notify=note,
        workers=args.workers or available_cores(),
        add_tokens=args.add_tokens,
    )
    progress.line.clear()
    meta = prepared.meta
    took = time.monotonic() - started
    resumed = ", continuing an interrupted run" if prepared.resumed else ""
    say(f"{prepared.directory}: {meta.vocab_size:,} {meta.tokenizer} tokens in the vocabulary")
    for split, tokens, characters in (
        ("train", meta.train_tokens, meta.train_characters),
        ("val", meta.val_tokens, meta.val_characters),
    ):
        rate = meta.characters_per_token(split) or 0.0
        say(f"  {split:5} {tokens:>13,} tokens {characters:>13,} characters  {rate:.3f} a token")
    for corpus in meta.corpora or []:
        sizes = f"{corpus['train_tokens']:>13,} to train {corpus['val_tokens']:>13,} held out"
        say(f"  {sizes}  {corpus['name']}, weight {corpus['weight']:g}")
    if meta.documents:
        counts = meta.documents
        say(f"  documents: {counts['train']:,} to train, {counts['val']:,} held out:")
        for held in counts["held_out"][:10]:
            say(f"    {held['title']} (document {held['document']}, {held['characters']:,})")
        if counts["val"] > 10:
            say(f"    … and {counts['val'] - 10:,} more, see meta.json")
    say(f"  {took:.1f} s{resumed}")
    say(f"next: {command_line('train')} --data {shlex.quote(str(prepared.directory))}")
    return 0


def _default_name(first: str) -> str:
    if first == "-":
        return "stdin"
    path = Path(first).resolve()
    if path.suffix.lower() in COMPRESSED_SUFFIXES:
        path = path.with_suffix("")
    return path.stem or "text"


class _Progress:
    """The stages of the work, on one line of a terminal; silent elsewhere."""

    LABELS = {"count": "reading", "tokenizer": "training the tokenizer", "encode": "encoding"}

    def __init__(self) -> None:
        self.line = StatusLine()
        self.stage = ""
        self.began = (0.0, 0)

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.began = stage, (now, done)
        if not self.line.is_due:
            return
        rate = (done - self.began[1]) / max(now - self.began[0], 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        percent = 100 * done / max(total, 1)
        text = f"{self.LABELS[stage]}: {percent:3.0f} % of {total / 1e6:,.1f} MB"
        self.line.show(f"{text}, {rate / 1e6:.1f} MB/s{left}")
