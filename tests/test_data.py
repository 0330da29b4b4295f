from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import gpt2fast.data.prepare as preparing
import gpt2fast.data.sources as sources
from gpt2fast.cli import prepare as command
from gpt2fast.config import GPT2Config
from gpt2fast.data import DataModule, TokenDataset, prepare_data
from gpt2fast.data.opening import TextInput
from gpt2fast.data.split import hold_out
from gpt2fast.data.text import END_OF_TEXT, Cuts, read_blocks
from gpt2fast.errors import ConfigError, DataError, Error, TokenizerError
from gpt2fast.tokenizer import BPETokenizer, CharTokenizer, Tokenizer

ROOT = Path(__file__).parents[1]
STORY = (
    "Once upon a time there was a king who had three sons, and he loved them all. "
    "The eldest went out to see the world; the second stayed; the youngest sang.\n\n"
)
BOOKS = [f"Book {n}\n\n" + STORY * (n + 2) for n in range(12)]
LIBRARY = f"\n{END_OF_TEXT}\n".join(BOOKS)

PIECE_LIST = [
    "a",
    "the",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\t",
    ".",
    ",",
    "!",
    "'s",
    "'ll",
    "'",
    "12",
    "é",
    "ü",
    "я",
    "的",
    "。",
    "😀",
    "́",
    "\xa0",
    "\u2028",
    "\x1c",
    "½",
    "<",
    "<|",
    "|>",
    END_OF_TEXT,
    f"\n{END_OF_TEXT}\n",
    f"{END_OF_TEXT}\n",
    "\x01",
    "\ufeff",
    "_",
    "<x y>",
    ";",
]
PIECES = st.sampled_from(PIECE_LIST)


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def tokens_of(directory: Path, split: str) -> list[int]:
    meta = json.loads((directory / "meta.json").read_text())
    tokens = array("H" if meta["dtype"] == "uint16" else "I")
    tokens.frombytes((directory / f"{split}.bin").read_bytes())
    return tokens.tolist()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def plain(text: str) -> str:
    """A text as it is to be encoded: Python's newlines, no newline after a separator line."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"(?m)^<\|endoftext\|>\n", END_OF_TEXT, text)


@pytest.fixture
def shared_book(tmp_path):
    return write(tmp_path / "book.txt", STORY * 20)


@pytest.fixture
def library(tmp_path):
    return write(tmp_path / "library.txt", LIBRARY)


@pytest.fixture(scope="module")
def bpe():
    # Trained on what it will be tested with, so that it has tokens that a wrong cut would tear.
    draw = random.Random(1)
    return BPETokenizer.train([LIBRARY, "".join(draw.choices(PIECE_LIST, k=20_000))], 1000)


@pytest.fixture(scope="module")
def bpe_dir(bpe, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    bpe.save_pretrained(directory)
    return directory


# -- reading in blocks ---------------------------------------------------------------------------

TEXTS = st.lists(PIECES, max_size=60).map("".join)


def encode_in_blocks(path: Path, tokenizer: Tokenizer, block_bytes: int) -> list[int]:
    end = tokenizer.eos_token_id
    assert end is not None
    ids = []
    for segments, _ in read_blocks(
        TextInput(path), preparing._cuts(tokenizer), block_bytes=block_bytes
    ):
        for text, separator, _ in segments:
            ids += tokenizer.encode(text) + [end] * separator
    return ids


@pytest.mark.parametrize("kind", ["bpe", "prefix_space", "spaced_special", "char"])
@given(text=TEXTS, block_bytes=st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_blocks_give_the_tokens_of_the_whole_text(
    kind, text, block_bytes, bpe_dir, tmp_path_factory
):
    tokenizer = _tokenizer(kind, bpe_dir, tmp_path_factory)
    path = write(tmp_path_factory.getbasetemp() / f"blocks-{kind}.txt", text)
    assert encode_in_blocks(path, tokenizer, block_bytes) == tokenizer.encode(plain(text))


_made: dict[str, Tokenizer] = {}


def _tokenizer(kind, bpe_dir, tmp_path_factory):
    if kind not in _made:
        if kind == "char":
            _made[kind] = CharTokenizer.train(
                [chr(c) for c in [*range(0x2100), 0x7684, 0x3002, 0x1F600, 0xFEFF]] + [END_OF_TEXT]
            )
        else:
            content = json.loads((bpe_dir / "tokenizer.json").read_text())
            if kind == "prefix_space":
                content["pre_tokenizer"]["add_prefix_space"] = True
            if kind == "spaced_special":
                special = {**content["added_tokens"][0], "content": "<x y>", "lstrip": True}
                special["id"] = len(content["model"]["vocab"])
                content["added_tokens"].append(special)
            directory = tmp_path_factory.mktemp(kind)
            (directory / "tokenizer.json").write_text(json.dumps(content))
            config = {"eos_token": END_OF_TEXT, "tokenizer_class": "GPT2Tokenizer"}
            config["add_prefix_space"] = kind == "prefix_space"
            (directory / "tokenizer_config.json").write_text(json.dumps(config))
            _made[kind] = Tokenizer.from_pretrained(directory)
    return _made[kind]


def joined(blocks) -> list[str]:
    parts = [""]
    for segments, _ in blocks:
        for text, separator, ends_document in segments:
            parts[-1] += text
            parts += [f"{separator} {ends_document}", ""] if separator else []
    return parts


@given(text=TEXTS, block_bytes=st.integers(1, 50), any_character=st.booleans())
@settings(max_examples=150, deadline=None)
def test_reading_can_start_again_after_any_block(
    text, block_bytes, any_character, tmp_path_factory
):
    path = write(tmp_path_factory.getbasetemp() / "again.txt", text)
    cuts = Cuts(any_character)
    blocks = list(read_blocks(TextInput(path), cuts, block_bytes=block_bytes))
    for number, (_, end) in enumerate(blocks):
        rest = read_blocks(TextInput(path), cuts, end, block_bytes=block_bytes)
        assert joined(rest) == joined(blocks[number + 1 :])


@pytest.mark.parametrize(
    "text",
    ["...", ".,;:", "a.!", "12.5", "it's,", "\x1c!", "!\x1c ", "ll'll", "的。的", "½.", "a  \n b"],
)
def test_no_block_ends_within_a_word_of_the_tokenizer(tmp_path, text):
    text = text * 40
    tokenizer = BPETokenizer.train([text], 300)
    path = write(tmp_path / "text.txt", text)
    for block_bytes in range(1, 40):
        assert encode_in_blocks(path, tokenizer, block_bytes) == tokenizer.encode(text)


def test_blocks_match_the_real_gpt2_tokenizer(data_dir, tmp_path):
    tokenizer = Tokenizer.from_pretrained(data_dir / "gpt2")
    text = (data_dir / "wiki.test.raw").read_text(encoding="utf-8")[:200_000]
    path = write(tmp_path / "wiki.txt", text)
    assert encode_in_blocks(path, tokenizer, 1000) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("text", "any_character"),
    [
        (STORY * 1000, False),
        ("天地玄黄，宇宙洪荒。" * 9000, False),
        ("A" * 100_000 + "\n" + "B" * 10, True),
        ("ACGT" * 50_000, True),
        ("<" * 100_000, True),
    ],
    ids=["prose", "chinese", "long line", "genome", "brackets"],
)
def test_blocks_stay_small(tmp_path, text, any_character):
    path = write(tmp_path / "text.txt", text)
    blocks = list(read_blocks(TextInput(path), Cuts(any_character), block_bytes=8192))
    assert "".join(segments[0].text for segments, _ in blocks) == text
    assert max(len(segments[0].text.encode()) for segments, _ in blocks) <= 3 * 8192


@pytest.mark.parametrize("letter", ["a", " ", "\n", "é", "1", "!"])
def test_a_text_of_one_letter_works(tmp_path, bpe_dir, letter):
    path = write(tmp_path / "letters.txt", letter * 300_000)
    data = prepare_data(path, tmp_path / "out", tokenizer=str(bpe_dir))
    tokenizer = Tokenizer.from_pretrained(bpe_dir)
    assert tokens_of(data.directory, "train") == tokenizer.encode(letter * 270_000)
    assert data.meta.val_characters == 30_000


# -- the position split --------------------------------------------------------------------------


def test_tiny_shakespeare_is_split_as_nanogpt_does(data_dir, tmp_path):
    path = data_dir / "tinyshakespeare.txt"
    text = path.read_text(encoding="utf-8")
    data = prepare_data(path, tmp_path / "out")
    ids = {character: id for id, character in enumerate(sorted(set(text)))}
    boundary = int(len(text) * 0.9)
    assert tokens_of(data.directory, "train") == [ids[c] for c in text[:boundary]]
    assert tokens_of(data.directory, "val") == [ids[c] for c in text[boundary:]]
    meta = data.meta
    assert (meta.train_tokens, meta.val_tokens, meta.vocab_size) == (1003854, 111540, 65)
    assert (meta.train_characters, meta.val_characters, meta.dtype) == (1003854, 111540, "uint16")


@given(text=st.lists(PIECES, min_size=50, max_size=90).map("".join), fraction=st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_the_parts_are_the_text(text, fraction, tmp_path_factory):
    path = write(tmp_path_factory.getbasetemp() / "parts.txt", text)
    out = tmp_path_factory.getbasetemp() / "parts"
    data = prepare_data(path, out, val_fraction=fraction, overwrite=True)
    tokenizer = Tokenizer.from_pretrained(out)
    train, val = (tokenizer.decode(tokens_of(out, split)) for split in ("train", "val"))
    assert train + val == plain(text)
    symbols = len(plain(text).replace(END_OF_TEXT, "x"))
    assert data.meta.train_characters == data.meta.train_tokens == int(symbols * (1 - fraction))
    assert data.meta.val_characters == data.meta.val_tokens


def test_files_are_taken_one_after_another(tmp_path):
    one, two = write(tmp_path / "1.txt", "abc\n" * 50), write(tmp_path / "2.txt", "xyz\n" * 50)
    data = prepare_data([two, one], tmp_path / "out", val_fraction=0.5)
    decode = Tokenizer.from_pretrained(data.directory).decode
    assert decode(tokens_of(data.directory, "train")) == "xyz\n" * 50
    assert decode(tokens_of(data.directory, "val")) == "abc\n" * 50
    assert data.meta.sources == ["2.txt", "1.txt"]


def test_a_folder_means_its_text_files_sorted_at_any_depth(tmp_path):
    folder = tmp_path / "books"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    write(folder / "b.txt", "bb")
    write(folder / "a.MD", "aa")
    write(folder / "sub" / "c.txt", "cc")
    write(folder / "ignored.py", "??")
    write(folder / ".git" / "x.txt", "??")
    out = folder / "prepared"
    for _ in range(2):  # a second run does not read what the first wrote
        data = prepare_data(folder, out, val_fraction=0.4, overwrite=True)
        tokenizer = Tokenizer.from_pretrained(out)
        ids = tokens_of(out, "train") + tokens_of(out, "val")
        assert tokenizer.decode(ids) == "aa\nbb\ncc"
        assert data.meta.sources == ["a.MD", "b.txt", "c.txt"]


def test_our_own_outputs_are_not_taken_for_text(shared_book, tmp_path):
    folder = tmp_path / "data"
    prepare_data(shared_book, folder / "book", tokenizer="bpe", vocab_size=300)
    assert (folder / "book" / "merges.txt").exists()
    with pytest.raises(DataError, match=r"holds no .*meta\.json"):
        prepare_data(folder, tmp_path / "out")
    write(folder / "mine.txt", "Call me Ishmael. " * 9)
    assert prepare_data(folder, tmp_path / "out").meta.sources == ["mine.txt"]


def test_newlines_and_byte_order_mark_are_read_as_python_reads_text(tmp_path):
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n" * 1 + b"four\r\n" * 30)
    data = prepare_data(path, tmp_path / "out")
    text = path.read_text(encoding="utf-8-sig")
    decode = Tokenizer.from_pretrained(data.directory).decode
    ids = tokens_of(data.directory, "train") + tokens_of(data.directory, "val")
    assert decode(ids) == text
    assert data.meta.train_characters + data.meta.val_characters == len(text)


# -- documents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["char", "bpe", "files"])
@pytest.mark.parametrize("split", ["position", "documents"])
def test_a_separator_line_is_one_token(tmp_path, bpe_dir, tokenizer, split):
    path = write(tmp_path / "text.txt", f"{STORY}{END_OF_TEXT}\n{STORY}{END_OF_TEXT}\n{STORY}")
    name = str(bpe_dir) if tokenizer == "files" else tokenizer
    data = prepare_data(path, tmp_path / "out", tokenizer=name, vocab_size=300, split=split)
    loaded = Tokenizer.from_pretrained(data.directory)
    ids = tokens_of(data.directory, "train") + tokens_of(data.directory, "val")
    ends = 3 if split == "documents" else 2
    assert ids.count(loaded.eos_token_id) == ends
    assert loaded.decode(ids).split(END_OF_TEXT)[:2] == [STORY, STORY]
    assert data.meta.eos_token_id == loaded.eos_token_id


def test_separators_stay_outside_the_character_vocabulary(tmp_path):
    path = write(tmp_path / "text.txt", f"abab\n{END_OF_TEXT}\nbaba\n" * 9)
    meta = prepare_data(path, tmp_path / "out").meta
    assert meta.vocab_size == 4  # "\n", "a", "b" and the separator
    assert meta.eos_token_id == 3


def test_whole_documents_are_held_out(library, tmp_path):
    data = prepare_data(library, tmp_path / "out", split="documents", val_fraction=0.2)
    decode = Tokenizer.from_pretrained(data.directory).decode
    train, val = (
        decode(tokens_of(data.directory, split)).split(END_OF_TEXT) for split in ("train", "val")
    )
    assert train.pop() == val.pop() == ""  # every document is ended
    held_out = data.meta.documents["held_out"]
    assert val == [plain(BOOKS[d["document"]] + "\n" * (d["document"] < 11)) for d in held_out]
    assert sorted(train + val) == sorted(plain(book + "\n") for book in BOOKS[:-1]) + BOOKS[
        -1:
    ] or ({text.strip() for text in train + val} == {book.strip() for book in BOOKS})
    assert [d["title"] for d in held_out] == [f"Book {d['document']}" for d in held_out]
    assert [d["characters"] for d in held_out] == [len(text) + 1 for text in val]
    share = data.meta.val_characters / (data.meta.val_characters + data.meta.train_characters)
    assert 0.15 < share < 0.23
    assert data.meta.documents["train"] == len(train)
    assert data.meta.documents["val"] == len(val)


def test_files_are_documents_and_blank_ones_are_left_out(tmp_path):
    names = [write(tmp_path / f"{n}.txt", f"text {n}\n") for n in range(4)]
    names.insert(2, write(tmp_path / "blank.txt", f" \n{END_OF_TEXT}\n\n"))
    data = prepare_data(names, tmp_path / "out", split="documents", val_fraction=0.25)
    assert (data.meta.documents["train"], data.meta.documents["val"]) == (3, 1)
    decode = Tokenizer.from_pretrained(data.directory).decode
    ids = tokens_of(data.directory, "train") + tokens_of(data.directory, "val")
    found = decode(ids).split(END_OF_TEXT)
    assert sorted(found) == ["", *(f"text {n}\n" for n in range(4))]


@given(
    lengths=st.lists(st.integers(1, 1000), min_size=2, max_size=60),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(-5, 1000),
)
def test_held_out_documents_make_up_the_fraction(lengths, fraction, seed):
    target = fraction * sum(lengths)
    chosen = hold_out(lengths, target, seed)
    assert len(set(chosen)) == len(chosen)
    assert 0 < len(chosen) < len(lengths)
    total = sum(lengths[index] for index in chosen)
    assert total <= 1.1 * target or total == min(lengths)
    assert chosen == hold_out(lengths, target, seed)


def test_bpe_is_trained_on_the_training_part_only(tmp_path):
    train, val = STORY * 9, "zyzzyva quagga " * 40
    path = write(tmp_path / "text.txt", train + val)
    fraction = len(val) / len(train + val)
    data = prepare_data(
        path, tmp_path / "out", tokenizer="bpe", vocab_size=300, val_fraction=fraction
    )
    boundary = data.meta.train_characters
    expected = BPETokenizer.train([(train + val)[:boundary]], 300)
    assert data.meta.tokenizer_fingerprint == expected.fingerprint()
    assert data.meta.tokenizer_fingerprint != BPETokenizer.train([train + val], 300).fingerprint()
    assert data.meta.vocab_size == expected.vocab_size


def test_a_large_vocabulary_takes_32_bits(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    path = write(tmp_path / "many.txt", text)
    data = prepare_data(path, tmp_path / "out", val_fraction=0.01)
    assert data.meta.dtype == "uint32"
    assert tokens_of(data.directory, "train") + tokens_of(data.directory, "val") == [*range(70_000)]
    x, y = TokenDataset(data.directory, 200, "val")[450]
    assert x.tolist() == [*range(69_750, 69_950)]
    assert y[-1] == 69_950


# -- mistakes ------------------------------------------------------------------------------------

MISTAKES = {
    "latin1": (b"abc \xe9\n", {}, r"bad\.txt is not UTF-8 text: at byte 4, 0xe9.*iconv"),
    "late": (b"a" * 3_000_000 + b"\xff" + b"a", {}, r"at byte 3000000, 0xff"),
    "cut": (b"abc\xf0\x9f\x98", {}, r"at byte 3, 0xf0"),
    "half of utf-16": ("hällo".encode("utf-16")[:-1], {}, r"cannot be read as utf-16: .*truncated"),
    "utf-16le": ("hällo du".encode("utf-16-le"), {}, r"UTF-16LE without .*iconv -f utf-16le"),
    "utf-16be": ("hällo du".encode("utf-16-be"), {}, r"UTF-16BE without .*iconv -f utf-16be"),
    "utf-32le": ("hällo du".encode("utf-32-le"), {}, r"UTF-32LE without .*iconv -f utf-32le"),
    "utf-32be": ("hällo du".encode("utf-32-be"), {}, r"UTF-32BE without .*iconv -f utf-32be"),
    "empty": (b"", {}, r"no text in the input \(bad\.txt\)"),
    "only a mark": (b"\xef\xbb\xbf", {}, r"no text"),
    "short": (b"ab", {"val_fraction": 0.9}, r"training part would be empty.*--val-fraction"),
    "one letter": (b"a", {}, r"training part would be empty"),
    "one document": (b"abc\n", {"split": "documents"}, r"only one document.*--split position"),
    "blank documents": (b" \n<|endoftext|>\n\n", {"split": "documents"}, r"no text"),
    "split": (b"abc", {"split": "random"}, r"split is 'random'; choose position or documents"),
    "fraction": (b"abc", {"val_fraction": 1.5}, r"val_fraction is 1\.5; .* between 0 and 1"),
    "not a number": (b"abc", {"val_fraction": float("nan")}, r"val_fraction is nan"),
    "vocabulary": (b"a b c", {"tokenizer": "bpe", "vocab_size": 10}, r"vocab_size"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_leaves_nothing_behind(tmp_path, name):
    content, arguments, message = MISTAKES[name]
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(Error, match=message):
        prepare_data(path, tmp_path / "new" / "out", **arguments)
    assert os.listdir(tmp_path) == ["bad.txt"]


def test_missing_inputs_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    for inputs, message in [
        (tmp_path / "no.txt", r"no\.txt does not exist"),
        (tmp_path / "folder", r"folder holds no \.txt, \.md, .*\.parquet, .* or \.json files"),
        ([], "no input was given"),
        (["-", "-"], r"standard input \(-\) was given more than once"),
    ]:
        with pytest.raises(DataError, match=message):
            prepare_data(inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_tokenizer_is_told_before_the_text_is_read(shared_book, tmp_path):
    with pytest.raises(Error, match="nowhere"):
        prepare_data(
            shared_book,
            tmp_path / "out",
            tokenizer=str(tmp_path / "nowhere"),
            progress=lambda *_: pytest.fail("the text was read"),
        )
    assert not (tmp_path / "out").exists()


def test_an_unknown_character_is_named(tmp_path):
    CharTokenizer.train(["abc"]).save_pretrained(tmp_path)
    path = write(tmp_path / "text.txt", "abcabcé")
    with pytest.raises(TokenizerError, match=r"U\+00E9"):
        prepare_data(path, tmp_path / "out", tokenizer=str(tmp_path))
    path = write(tmp_path / "text.txt", f"abcabc\n{END_OF_TEXT}\n".replace("\n", "", 1) * 3)
    with pytest.raises(DataError, match="the tokenizer has no end token"):
        prepare_data(path, tmp_path / "out", tokenizer=str(tmp_path))


@pytest.mark.parametrize("name", ["train.bin", "tokenizer.json", "meta.json"])
def test_nothing_is_overwritten_unasked(shared_book, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("precious")
    with pytest.raises(DataError, match=rf"already holds {re.escape(name)}.*--overwrite"):
        prepare_data(shared_book, out)
    assert contents(out) == {name: b"precious"}
    prepare_data(shared_book, out, overwrite=True)
    assert len(tokens_of(out, "train")) > 0


def test_overwriting_removes_the_files_of_the_other_tokenizer(library, tmp_path):
    prepare_data(library, tmp_path / "out", tokenizer="bpe", vocab_size=300)
    (tmp_path / "out" / "notes").write_text("mine")
    prepare_data(library, tmp_path / "out", tokenizer="char", overwrite=True)
    fresh = prepare_data(library, tmp_path / "fresh", tokenizer="char").directory
    (fresh / "notes").write_text("mine")
    assert contents(tmp_path / "out") == contents(fresh)


def test_a_file_or_a_busy_directory_is_no_place_to_write(shared_book, tmp_path):
    with pytest.raises(DataError, match="is a file; name a directory"):
        prepare_data(shared_book, shared_book)
    pytest.importorskip("fcntl")

    def a_second_run(stage, done, total):
        with pytest.raises(DataError, match="another process is preparing data"):
            prepare_data(shared_book, tmp_path / "out", overwrite=True)

    prepare_data(shared_book, tmp_path / "out", progress=a_second_run)


# -- interruption --------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a power cut: nothing of prepare's handles it."""


def interrupt_after(calls: int):
    def progress(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise Killed

    return progress


@pytest.fixture
def small_blocks(monkeypatch):
    def read_small_blocks(path, cuts, start=0):
        return read_blocks(path, cuts, start, block_bytes=1500)

    monkeypatch.setattr(sources, "read_blocks", read_small_blocks)
    monkeypatch.setattr(sources, "BLOCK_CHARACTERS", 1500)
    monkeypatch.setattr(preparing, "_SECONDS_BETWEEN_SAVES", -1.0)


@pytest.mark.parametrize("split", ["position", "documents"])
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    library, tmp_path, small_blocks, split, tokenizer
):
    second = write(tmp_path / "second.txt", STORY * 9)
    arguments = {"tokenizer": tokenizer, "vocab_size": 300, "split": split}
    straight = prepare_data([library, second], tmp_path / "straight", **arguments)
    assert not straight.resumed
    out = tmp_path / "interrupted"
    for calls in range(200):
        try:
            data = prepare_data(
                [library, second], out, **arguments, progress=interrupt_after(calls)
            )
            break
        except Killed:
            assert not (out / "meta.json").exists()
            # what was written after the last save is thrown away
            for name in ("train.bin", "val.bin"):
                if (out / ".unfinished" / name).exists():
                    with open(out / ".unfinished" / name, "ab") as file:
                        file.write(b"half a block")
    assert data.resumed
    assert 5 < calls < 60
    assert contents(out) == contents(straight.directory)


def test_continuing_does_not_begin_again(library, tmp_path, small_blocks):
    stages: list[str] = []

    def progress(stage, done, total):
        stages.append(stage)
        if len(stages) == len(whole) - 2:
            raise Killed

    whole: list[str] = []
    prepare_data(library, tmp_path / "whole", progress=lambda stage, *_: whole.append(stage))
    with pytest.raises(Killed):
        prepare_data(library, tmp_path / "out", progress=progress)
    rest: list[str] = []
    prepare_data(library, tmp_path / "out", progress=lambda stage, *_: rest.append(stage))
    assert set(rest) == {"encode"}
    assert len(rest) <= 3


@pytest.mark.parametrize("place", range(8))
def test_an_interruption_while_moving_into_place_does_no_harm(
    library, tmp_path, monkeypatch, place
):
    out = tmp_path / "out"
    prepare_data(library, out, tokenizer="bpe", vocab_size=300)
    fresh = prepare_data(library, tmp_path / "fresh").directory
    real, calls = os.replace, 0

    def failing(source, target):
        nonlocal calls
        if Path(target).parent == out or Path(source).parent == out:
            calls += 1
            if calls == place + 1:
                raise Killed
        real(source, target)

    monkeypatch.setattr(preparing.os, "replace", failing)
    try:
        prepare_data(library, out, overwrite=True)
    except Killed:
        monkeypatch.undo()
        if (out / "meta.json").exists():
            assert DataModule(out, 8, 2).meta.tokenizer == "bpe"  # still the old one, whole
        else:
            with pytest.raises(DataError, match="interrupted preparation"):
                DataModule(out, 8, 2)
        assert prepare_data(library, out).resumed
    assert calls > min(place, 6)
    assert contents(out) == contents(fresh)


def test_a_killed_process_is_continued(tmp_path):
    path = write(tmp_path / "book.txt", STORY * 30_000)
    script = f"""
import os, signal, gpt2fast.data.prepare as preparing
preparing._SECONDS_BETWEEN_SAVES = 0.0
def progress(stage, done, total):
    if stage == "encode" and done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
preparing.prepare_data({str(path)!r}, {str(tmp_path / "out")!r}, progress=progress)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    done = []
    data = prepare_data(path, tmp_path / "out", progress=lambda stage, d, t: done.append(d / t))
    assert data.resumed
    assert min(done) > 0.4
    straight = prepare_data(path, tmp_path / "straight").directory
    assert contents(data.directory) == contents(straight)


def test_an_interrupted_pipe_leaves_nothing_and_starts_again(library, tmp_path, monkeypatch):
    def pipe(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    pipe(LIBRARY)
    with pytest.raises(Killed):
        prepare_data("-", tmp_path / "out", progress=interrupt_after(1))
    assert not (tmp_path / "out").exists()

    with pytest.raises(Killed):
        prepare_data(library, tmp_path / "out", progress=interrupt_after(4))
    # What a pipe leaves if the machine stops: all that an interrupted run has but run.json.
    (tmp_path / "out" / ".unfinished" / "run.json").unlink()
    assert (tmp_path / "out" / ".unfinished" / "plan.json").exists()
    pipe(STORY)
    data = prepare_data("-", tmp_path / "out")
    assert not data.resumed
    pipe(STORY)
    assert contents(data.directory) == contents(prepare_data("-", tmp_path / "new").directory)


def interrupted_run(path: Path, out: Path, **arguments) -> None:
    with pytest.raises(Killed):
        prepare_data(path, out, **arguments, progress=interrupt_after(1))


@pytest.mark.parametrize("change", ["longer", "touched", "other file", "settings"])
def test_an_interrupted_run_is_not_continued_with_something_else(
    library, tmp_path, small_blocks, change
):
    out = tmp_path / "out"
    interrupted_run(library, out)
    arguments: dict = {}
    if change == "longer":
        write(library, LIBRARY + "more")
        message = r"library\.txt has changed since the interrupted run"
    elif change == "touched":
        os.utime(library, ns=(1, 1))
        message = r"library\.txt has changed since the interrupted run"
    elif change == "other file":
        library = write(tmp_path / "other.txt", LIBRARY)
        message = "interrupted run on other files"
    else:
        arguments = {"val_fraction": 0.3}
        message = r"other settings \(val_fraction 0\.1, now 0\.3\)"
    with pytest.raises(DataError, match=f"{message}.*start over with --overwrite"):
        prepare_data(library, out, **arguments)
    assert (out / ".unfinished" / "run.json").exists()  # the mistake does not cost the work
    assert not prepare_data(library, out, **arguments, overwrite=True).resumed
    assert os.path.exists(out / "meta.json") and not (out / ".unfinished").exists()


def test_a_file_that_changes_while_it_is_read_is_noticed(library, tmp_path):
    def growing(stage, done, total):
        if stage == "encode":
            with open(library, "a") as file:
                file.write(f"\n{END_OF_TEXT}\nmore")

    for split in ("position", "documents"):
        with pytest.raises(DataError, match="has changed while it was being read"):
            prepare_data(library, tmp_path / "out", split=split, progress=growing)
        assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_text(tmp_path):
    pytest.importorskip("resource")
    script = """
import resource, sys
from gpt2fast.data import prepare_data
for path in sys.argv[2:]:
    prepare_data(path, sys.argv[1], overwrite=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    small = write(tmp_path / "small.txt", STORY * 20_000)  # 3 MB
    large = write(tmp_path / "large.txt", STORY * 120_000)
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "out", small, large],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = map(int, done.stdout.split())
    assert second - first < 10_000  # kilobytes


# -- datasets and batches ------------------------------------------------------------------------


@pytest.fixture
def prepared(library, tmp_path):
    return prepare_data(library, tmp_path / "prepared", tokenizer="bpe", vocab_size=300).directory


def test_a_window_and_its_targets_are_one_token_apart(prepared):
    ids = tokens_of(prepared, "train")
    dataset = TokenDataset(prepared, 16)
    assert len(dataset) == len(ids) - 16
    for index in (0, 7, len(dataset) - 1, -1, -len(dataset)):
        start = index % len(dataset)
        x, y = dataset[index]
        assert x.dtype == y.dtype == torch.int64
        assert x.tolist() == ids[start : start + 16]
        assert y.tolist() == ids[start + 1 : start + 17]
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[index]
    x, _ = TokenDataset(prepared / "val.bin", 4)[0]
    assert x.tolist() == tokens_of(prepared, "val")[:4]
    x, _ = TokenDataset(prepared, 4, split="val")[0]
    assert x.tolist() == tokens_of(prepared, "val")[:4]


def test_a_dataset_works_in_a_data_loader(prepared):
    dataset = TokenDataset(prepared, 16)
    x, y = next(iter(DataLoader(dataset, batch_size=5, shuffle=True)))
    assert x.shape == y.shape == (5, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    copy = pickle.dumps(dataset)  # as for a worker process
    assert len(copy) < 1000
    assert torch.equal(pickle.loads(copy)[3][0], dataset[3][0])


def test_token_ids_above_the_signed_range_are_read(tmp_path):
    (tmp_path / "a.bin").write_bytes(array("H", [0, 40_000, 65_535, 1]).tobytes())
    x, y = TokenDataset(tmp_path / "a.bin", 3)[0]
    assert x.tolist() == [0, 40_000, 65_535] and y.tolist() == [40_000, 65_535, 1]
    (tmp_path / "b.bin").write_bytes(array("I", [0, 3_000_000_000, 1]).tobytes())
    x, y = TokenDataset(tmp_path / "b.bin", 2, dtype="uint32")[0]
    assert x.tolist() == [0, 3_000_000_000]


def test_batch_s_depends_on_seed_and_s_alone(prepared):
    def first(count, start_step=0, **changes):
        arguments = {"block_size": 8, "batch_size": 3, "seed": 1} | changes
        loader = DataModule(prepared, **arguments).train_dataloader(start_step)
        return [x.tolist() for x, _ in itertools.islice(loader, count)]

    straight = first(6)
    assert first(6) == straight
    assert first(3, start_step=3) == straight[3:]
    assert first(6, seed=2) != straight
    assert len({str(batch) for batch in straight}) == 6
    loader = DataModule(prepared, 8, 3, seed=1).train_dataloader()
    assert [next(iter(loader))[0].tolist(), loader[4][0].tolist()] == [straight[0], straight[4]]


def test_training_windows_come_from_everywhere_in_the_text(tmp_path):
    (tmp_path / "train.bin").write_bytes(array("H", range(20)).tobytes())
    (tmp_path / "val.bin").write_bytes(array("H", range(20)).tobytes())
    with pytest.warns(UserWarning):
        data = DataModule(tmp_path, block_size=4, batch_size=500)
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == y.shape == (500, 4)
    assert x.is_contiguous() and y.is_contiguous()
    assert set(x[:, 0].tolist()) == set(range(16))  # every start that has a target
    assert torch.equal(y, x + 1)
    assert torch.equal(x - x[:, :1], torch.arange(4).expand(500, 4))


@pytest.mark.parametrize("block_size", [1, 7, 10, 39, 40])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_validation_predicts_every_token_but_the_first_once(tmp_path, block_size, batch_size):
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(array("H", range(41)).tobytes())
    with pytest.warns(UserWarning):
        data = DataModule(tmp_path, block_size, batch_size)
    loader = data.val_dataloader()
    batches = list(loader)
    assert [t for _, y in batches for t in y.flatten().tolist()] == [*range(1, 41)]
    assert all(torch.equal(x, y - 1) for x, y in batches)
    assert all(x.shape[0] <= batch_size and x.shape[1] <= block_size for x, _ in batches)
    assert len(batches) == len(loader)
    assert [x.tolist() for x, _ in loader] == [x.tolist() for x, _ in batches]


def test_a_batch_takes_less_than_a_millisecond(prepared):
    loader = iter(DataModule(prepared, block_size=128, batch_size=64).train_dataloader())
    times = []
    for _ in range(50):
        start = time.perf_counter()
        next(loader)
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3


def test_characters_per_token_turn_a_loss_into_nats_per_character(prepared):
    data = DataModule(prepared, 8, 2)
    val = tokens_of(prepared, "val")
    text = data.tokenizer.decode(val).replace(END_OF_TEXT, "x")
    assert data.meta.characters_per_token("val") == pytest.approx(len(text) / len(val))
    train = data.meta.train_characters / data.meta.train_tokens
    assert data.meta.characters_per_token("train") == train


# -- checks before the first step ----------------------------------------------------------------


def change_meta(directory: Path, **changes) -> None:
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "meta.json").write_text(json.dumps(meta | changes))


def put(directory: Path, split: str, ids: list[int]) -> None:
    (directory / f"{split}.bin").write_bytes(array("H", ids).tobytes())
    change_meta(directory, **{f"{split}_tokens": len(ids)})


def other_tokenizer(directory: Path) -> None:
    BPETokenizer.train(["something else entirely " * 9], 300).save_pretrained(directory)


BAD_DATA = {
    "empty": (lambda d: put(d, "val", []), r"val\.bin is empty"),
    "short": (lambda d: put(d, "val", [1] * 8), r"holds 8 tokens, a block_size of 8 needs .* 9"),
    "ids": (lambda d: put(d, "train", [1] * 99 + [300]), r"token 99 is 300, outside .* \(300\)"),
    "high ids": (lambda d: put(d, "val", [1] * 9 + [65535]), r"token 9 is 65535"),
    "folder": (
        lambda d: [(d / "train.bin").unlink(), (d / "train.bin").mkdir()],
        r"train\.bin is a folder",
    ),
    "odd size": (lambda d: (d / "val.bin").write_bytes(b"abc"), "3 bytes are not a whole number"),
    "cut": (lambda d: (d / "val.bin").write_bytes(b"ab" * 50), r"holds 50 tokens, meta\.json says"),
    "no val.bin": (lambda d: (d / "val.bin").unlink(), r"val\.bin does not exist.*prepare"),
    "foreign": (other_tokenizer, "are not those that the data were made with"),
    "no tokenizer": (
        lambda d: (
            [(d / n).unlink() for n in os.listdir(d) if n[-3:] != "bin" and n[0] != "m"]
            + [(d / "merges.txt").unlink()]
        ),
        "the tokenizer of the data",
    ),
    "torn meta": (lambda d: (d / "meta.json").write_text("{"), r"meta\.json cannot be read"),
    "list": (lambda d: (d / "meta.json").write_text("[]"), r"format is 'list'"),
    "format": (lambda d: change_meta(d, format=2), r"format is 2, this version reads 1"),
    "type": (lambda d: change_meta(d, vocab_size="300"), r"vocab_size is '300', of the wrong type"),
    "bool": (lambda d: change_meta(d, train_tokens=True), r"train_tokens is True"),
    "negative": (lambda d: change_meta(d, val_characters=-1), r"val_characters is -1"),
    "dtype": (lambda d: change_meta(d, dtype="int8"), r"dtype is 'int8', not uint16 or uint32"),
    "missing": (
        lambda d: (d / "meta.json").write_text('{"format": 1, "dtype": "uint16"}'),
        r"vocab_size, train_tokens.* missing",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_caught_before_the_first_step(prepared, name):
    damage, message = BAD_DATA[name]
    DataModule(prepared, block_size=8, batch_size=2)
    damage(prepared)
    with pytest.raises(DataError, match=message):
        DataModule(prepared, block_size=8, batch_size=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 10**6}, "a block_size of 1000000 needs"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"data_dir": "nowhere"}, "nowhere is not a directory of prepared data.*prepare"),
    ],
)
def test_impossible_batches_are_refused(prepared, arguments, message):
    with pytest.raises(DataError, match=message):
        DataModule(**{"data_dir": prepared, "block_size": 8, "batch_size": 2} | arguments)


def test_a_model_that_cannot_take_the_data_is_refused(prepared):
    data = DataModule(prepared, block_size=8, batch_size=2)
    data.check_model(GPT2Config(vocab_size=300, n_positions=8))
    data.check_model(GPT2Config(vocab_size=304, n_positions=64))  # padded
    with pytest.raises(DataError, match="vocabulary of 300 tokens, the model's vocab_size is 299"):
        data.check_model(GPT2Config(vocab_size=299))
    with pytest.raises(ConfigError, match="block_size 8 is more than the model's n_positions 7"):
        data.check_model(GPT2Config(vocab_size=300, n_positions=7))


def test_the_tokenizer_of_another_model_is_refused(prepared):
    data = DataModule(prepared, block_size=8, batch_size=2)
    data.check_tokenizer(Tokenizer.from_pretrained(prepared))
    with pytest.raises(DataError, match="another tokenizer .bpe, 300 tokens.*--tokenizer"):
        data.check_tokenizer(CharTokenizer.train(["abc"]))


def test_nanogpt_data_are_read_and_their_pickle_does_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Trap()))
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(array("H", [5, 50_256] * 20).tobytes())
    with (
        pytest.warns(UserWarning, match=r"no meta\.json.*NumPy's, uint16 tokens of an unknown"),
        pytest.warns(UserWarning, match=r"without a tokenizer: .*meta\.pkl .*could run code"),
    ):
        data = DataModule(tmp_path, block_size=8, batch_size=2)
    assert not (tmp_path / "sprung").exists()
    assert data.tokenizer is None
    assert data.meta.characters_per_token() is None
    assert next(iter(data.val_dataloader()))[0][0].tolist() == [5, 50_256] * 4
    data.check_model(GPT2Config())
    with pytest.raises(DataError, match="token 1 is 50256, outside the model's vocab_size"):
        data.check_model(GPT2Config(vocab_size=50_256))
    with pytest.warns(UserWarning, match="uint32 tokens"):
        data = DataModule(tmp_path, block_size=8, batch_size=2, dtype="uint32")
    assert data.meta.train_tokens == 20


def test_nanogpts_characters_come_with_its_data(tmp_path):
    text = "héllo wörld\n" * 30
    characters = sorted(set(text))
    ids = {character: id for id, character in enumerate(characters)}
    meta = {"vocab_size": len(ids), "itos": dict(enumerate(characters)), "stoi": ids}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    tokens = array("H", [ids[character] for character in text])
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(tokens.tobytes())
    with pytest.warns(UserWarning, match="uint16 tokens of meta.pkl's characters"):
        data = DataModule(tmp_path, block_size=8, batch_size=2)
    assert data.tokenizer.encode("wörld") == [ids[character] for character in "wörld"]
    assert data.meta.vocab_size == len(ids) and data.meta.characters_per_token() == 1
    with pytest.raises(DataError, match="another tokenizer"):
        data.check_tokenizer(CharTokenizer.train(["abc"]))
    (tmp_path / "train.bin").write_bytes(array("H", [0, len(ids)] * 20).tobytes())
    with (
        pytest.raises(DataError, match=f"token 1 is {len(ids)}, outside the vocabulary"),
        pytest.warns(UserWarning),
    ):
        DataModule(tmp_path, block_size=8, batch_size=2)


# -- the command line ----------------------------------------------------------------------------


def run(capsys, *arguments) -> tuple[int, str, str]:
    try:
        code = command.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


FLAGS = {
    "tokenizer": (["--tokenizer", "bpe"], lambda meta: meta["tokenizer"] == "bpe"),
    "vocab size": (
        ["--tokenizer", "bpe", "--vocab-size", "280"],
        lambda meta: meta["vocab_size"] == 280,
    ),
    "underscores": (
        ["--tokenizer=bpe", "--vocab_size=280"],
        lambda meta: meta["vocab_size"] == 280,
    ),
    "split": (["--split", "documents"], lambda meta: meta["documents"]["val"] > 0),
    "fraction": (["--val-fraction", "0.5"], lambda meta: meta["val_tokens"] > 6000),
}


@pytest.mark.parametrize("name", FLAGS)
def test_each_flag_changes_the_outcome(library, tmp_path, capsys, name):
    flags, holds = FLAGS[name]
    assert run(capsys, library, "--out", tmp_path / "plain")[0] == 0
    code, out, _ = run(capsys, library, "--out", tmp_path / "out", *flags)
    assert code == 0
    assert holds(json.loads((tmp_path / "out" / "meta.json").read_text()))
    assert contents(tmp_path / "out") != contents(tmp_path / "plain")
    assert f"next: python -m gpt2fast.train --data {tmp_path / 'out'}" in out


def test_the_seed_flag_chooses_other_documents(library, tmp_path, capsys):
    held_out = []
    for seed in (0, 1, 1):
        run(
            capsys, library, "--out", tmp_path / "out", "--overwrite",
            "--split", "documents", "--seed", seed,
        )  # fmt: skip
        documents = json.loads((tmp_path / "out" / "meta.json").read_text())["documents"]
        held_out.append([document["title"] for document in documents["held_out"]])
    assert held_out[0] != held_out[1] == held_out[2]


def test_the_overwrite_flag_replaces(library, shared_book, tmp_path, capsys):
    assert run(capsys, library, "--out", tmp_path / "out")[0] == 0
    code, _, error = run(capsys, shared_book, "--out", tmp_path / "out")
    assert code == 1
    assert error.startswith("error: ") and "--overwrite" in error
    assert run(capsys, shared_book, "--out", tmp_path / "out", "--overwrite")[0] == 0
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["sources"] == ["book.txt"]


def test_the_output_has_a_natural_default(shared_book, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "book.txt")
    assert code == 0
    assert (tmp_path / "data" / "book" / "meta.json").exists()
    assert "--data data/book" in out


def test_standard_input_is_read(library, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LIBRARY.encode())))
    code, _, error = run(capsys, "-", "--out", tmp_path / "piped", "--tokenizer", "bpe")
    assert (code, error) == (0, "")
    run(capsys, library, "--out", tmp_path / "file", "--tokenizer", "bpe")
    piped, file = contents(tmp_path / "piped"), contents(tmp_path / "file")
    assert json.loads(piped.pop("meta.json"))["sources"] == ["-"]
    file.pop("meta.json")
    assert piped == file


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "INPUT"),
        (["book.txt", "--no-such-flag"], 2, "--no-such-flag"),
        (["book.txt", "--split", "random"], 2, "invalid choice: 'random'"),
        (["book.txt", "--val-fraction", "2"], 2, "between 0 and 1"),
        (["book.txt", "--vocab-size", "300"], 2, "--tokenizer bpe"),
        (["book.txt", "--seed", "3"], 2, "--split documents"),
        (["book.txt", "--tokenizer", "bpe", "--vocab-size", "0"], 2, "--vocab-size is 0"),
        (["book.txt", "--out", ""], 2, "--out is empty"),
        (["nowhere.txt"], 1, "error: nowhere.txt does not exist\n"),
        (["book.txt", "--out", "book.txt"], 1, "error: book.txt is a file"),
    ],
)
def test_mistakes_on_the_command_line_end_with_one_line(
    shared_book, capsys, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(shared_book.parent)
    found, _, error = run(capsys, *arguments)
    assert found == code
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (shared_book.parent / "data").exists()


def test_the_progress_line_is_for_terminals_only(library, tmp_path, capsys, monkeypatch):
    assert run(capsys, library, "--out", tmp_path / "quiet")[2] == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(command.time, "monotonic", iter(range(10**6)).__next__)
    error = run(capsys, library, "--out", tmp_path / "shown")[2]
    assert "reading: 100 %" in error and "encoding: 100 %" in error
    assert error.endswith("\r\x1b[K")


def test_ctrl_c_ends_quietly(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-m", "gpt2fast.prepare", "-", "--out", str(out)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for _ in range(600):
            if (out / ".unfinished" / "stdin").exists():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == "interrupted\n"
    assert not out.exists()  # what came through a pipe cannot be continued


@pytest.mark.parametrize("redirection", ["| true", ">&-", "> /dev/full"])
def test_a_lost_reader_is_no_error(library, tmp_path, redirection):
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    command = f"{sys.executable} -m gpt2fast.prepare {library} --out {tmp_path / 'out'}"
    shell = f"{command} {redirection}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "meta.json").exists()
