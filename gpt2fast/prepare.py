"""Command line: text to token files (`python -m gpt2fast.prepare`)."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .arguments import OneLineParser
from .errors import Error
from .output import say

EXAMPLES = """\
examples:
  python -m gpt2fast.prepare book.txt
      characters as tokens, the last 10 % held out, into data/book
  python -m gpt2fast.prepare books/ --tokenizer bpe --vocab-size 2048 --split documents
      a byte-level BPE of its own; whole files (or documents) held out
  python -m gpt2fast.prepare notes.txt --tokenizer gpt2 --out data/notes
      GPT-2's own tokenizer, to fine-tune it
  zcat big.txt.gz | python -m gpt2fast.prepare - --out data/big

A folder stands for its .txt and .md files, at any depth, in alphabetical order. A line that is just
<|endoftext|> ends a document and becomes one token. An interrupted command continues when it is
given again. Text must be UTF-8."""


def parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m gpt2fast.prepare",
        description="Turn text into train.bin, val.bin, a tokenizer and meta.json for training.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="text file, folder, or - for standard input")
    add(
        "--tokenizer",
        default="char",
        metavar="NAME",
        help="char, bpe (trained on the training part of this text), gpt2, or another directory "
        "or hub name (default: char)",
    )
    add("--out", metavar="DIR", help="where to write (default: data/<name of INPUT>)")
    add("--vocab-size", type=int, metavar="N", help="tokens of a bpe tokenizer (default: 2048)")
    add(
        "--split",
        choices=("position", "documents"),
        default="position",
        help="hold out the end of the text, or whole documents drawn by chance (default: position)",
    )
    add(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="part of the characters held out for validation (default: 0.1)",
    )
    add("--seed", type=int, metavar="N", help="which documents are held out (default: 0)")
    add("--overwrite", action="store_true", help="replace what DIR holds, finished or not")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    command = parser()
    given = sys.argv[1:] if arguments is None else arguments
    args = command.parse_args([_hyphens(argument) for argument in given])
    if args.vocab_size is not None and args.tokenizer != "bpe":
        command.error(f"--vocab-size is for --tokenizer bpe, not {args.tokenizer}")
    if args.vocab_size is not None and args.vocab_size < 1:
        command.error(f"--vocab-size is {args.vocab_size}, but must be at least 1 (2048 is usual)")
    if args.out == "":
        command.error("--out is empty; name a folder, such as data/book")
    if args.seed is not None and args.split != "documents":
        command.error("--seed chooses the documents to hold out; it needs --split documents")
    if not 0 < args.val_fraction < 1:
        command.error(f"--val-fraction {args.val_fraction}: it must lie between 0 and 1")
    out = Path(args.out or f"data/{_default_name(args.inputs[0])}")
    line = _ProgressLine()
    try:
        return _prepare(args, out, line)
    except Error as error:
        line.clear()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        line.clear()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        line.clear()
        again = "" if "-" in args.inputs else "; give the same command again to continue"
        again += " (without --overwrite)" if again and args.overwrite else ""
        print(f"interrupted{again}", file=sys.stderr)
        return 130


def _prepare(args: argparse.Namespace, out: Path, line: _ProgressLine) -> int:
    from .data.prepare import prepare_data

    if "-" in args.inputs and sys.stdin.isatty():
        print("reading the text from the terminal; Ctrl-D ends it", file=sys.stderr)
    started = time.monotonic()
    prepared = prepare_data(
        args.inputs,
        out,
        tokenizer=args.tokenizer,
        vocab_size=2048 if args.vocab_size is None else args.vocab_size,
        split=args.split,
        val_fraction=args.val_fraction,
        seed=args.seed or 0,
        overwrite=args.overwrite,
        progress=line,
    )
    line.clear()
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
    if meta.documents:
        counts = meta.documents
        say(f"  documents: {counts['train']:,} to train, {counts['val']:,} held out:")
        for held in counts["held_out"][:10]:
            say(f"    {held['title']} (document {held['document']}, {held['characters']:,})")
        if counts["val"] > 10:
            say(f"    … and {counts['val'] - 10:,} more, see meta.json")
    say(f"  {took:.1f} s{resumed}")
    say(f"next: python -m gpt2fast.train --data {shlex.quote(str(prepared.directory))}")
    return 0


def _hyphens(argument: str) -> str:
    """--val_fraction=0.1 as --val-fraction=0.1."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _default_name(first: str) -> str:
    return "stdin" if first == "-" else Path(first).resolve().stem or "text"


class _ProgressLine:
    """One line on a terminal that is written over; silent elsewhere."""

    LABELS = {"count": "reading", "tokenizer": "training the tokenizer", "encode": "encoding"}

    def __init__(self) -> None:
        self.shown = 0.0
        self.stage = ""
        self.began = (0.0, 0)
        self.visible = sys.stderr.isatty()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.began = stage, (now, done)
        if not self.visible or now - self.shown < 0.1:
            return
        self.shown = now
        rate = (done - self.began[1]) / max(now - self.began[0], 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        percent = 100 * done / max(total, 1)
        text = f"{self.LABELS[stage]}: {percent:3.0f} % of {total / 1e6:,.1f} MB"
        sys.stderr.write(f"\r\x1b[K{text}, {rate / 1e6:.1f} MB/s{left}")
        sys.stderr.flush()

    def clear(self) -> None:
        if self.visible and self.shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
