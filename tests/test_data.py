"""Preparing text: splits, documents and mistakes."""

# ruff: noqa: F401, F811 (imported fixtures)

from __future__ import annotations

import os
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2fast.data import TokenDataset, prepare_data
from gpt2fast.data.split import hold_out
from gpt2fast.data.text import END_OF_TEXT
from gpt2fast.errors import DataError, Error, TokenizerError
from gpt2fast.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from small_library import (
    BOOKS,
    PIECES,
    STORY,
    bpe,
    bpe_dir,
    contents,
    library,
    plain,
    shared_book,
    tokens_of,
    write,
)

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
