"""Files other than plain UTF-8: compressed, recoded, tables and arrays, and what is no text.

The right bytes are those that the same text gives as a plain file.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2fast.data import DataModule, prepare_data
from gpt2fast.data.opening import TextInput
from gpt2fast.errors import DataError
from gpt2fast.evaluation.sources import read_text
from small_library import Killed, interruptible
from time_limits import patience

TEXT = 'The sea was high.\r\n"Aye, café", he said; 海\n<|endoftext|>\nSecond text\n' * 60
DOCUMENTS = [f'Document\t{i}, with "quotes";\nlines and café' for i in range(90)]


def zipped(data: bytes, name: str = "folder/book.txt") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("folder")
        archive.writestr(name, data)
        archive.writestr("__MACOSX/._book.txt", b"\0\5\x16\7")
    return file.getvalue()


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard", reason="reads and writes zstd")
    half = len(data) // 2
    frames = [zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:])]
    return b"".join(frames)


COMPRESSORS = {
    "gz": gzip.compress,
    "two members.gz": lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
    "zip": zipped,
}


def tokens(path: Path, out: Path, **arguments) -> bytes:
    data = prepare_data(path, out, **arguments)
    return data.train_file.read_bytes() + data.val_file.read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("plain")
    (folder / "book.txt").write_bytes(TEXT.encode())
    return tokens(folder / "book.txt", folder / "out")


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("records")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    return tokens(folder / "a.jsonl", folder / "out", tokenizer="bpe", vocab_size=300)


@pytest.mark.parametrize("named", [True, False], ids=["by its name", "under another name"])
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_compressed_text_gives_the_same_tokens(tmp_path, plain, kind, named):
    path = tmp_path / (f"book.txt.{kind.split('.')[-1]}" if named else "book.txt")
    path.write_bytes(COMPRESSORS[kind](TEXT.encode()))
    assert tokens(path, tmp_path / "out") == plain
    assert read_text(path) == TEXT


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_a_compressed_text_that_is_cut_or_changed_is_no_shorter_text(tmp_path, kind):
    whole = COMPRESSORS[kind](TEXT.encode())
    path = tmp_path / f"book.txt.{kind.split('.')[-1]}"
    for cut in (len(whole) - 1, len(whole) // 3, 12):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"book\.txt\.\w+ cannot be unpacked"):
            prepare_data(path, tmp_path / "out")
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
def test_a_byte_order_mark_is_heeded(tmp_path, plain, encoding, compress):
    path = tmp_path / "book.txt"
    path.write_bytes(compress(TEXT.encode(encoding)))
    assert tokens(path, tmp_path / "out") == plain
    assert read_text(path) == TEXT


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32-be", "gb18030", "UTF8", "utf_16"])
def test_an_encoding_that_is_named_is_read(tmp_path, plain, encoding):
    path = tmp_path / "book.txt"
    path.write_bytes(TEXT.encode(encoding))
    assert tokens(path, tmp_path / "out", encoding=encoding) == plain


SAMPLES = {
    "cp932": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "euc-jp": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "gb18030": "道可道，非常道。名可名，非常名。无名天地之始；有名万物之母。",
    "big5": "道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。",
    "cp949": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "cp1251": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "koi8-r": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "cp1252": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Größe, für",
}


@pytest.mark.parametrize("text", [
    "Все счастливые семьи похожи друг на друга.\n" * 30, "كل الناس\n" * 9, "सभी मनुष्य\n" * 9,
    "hi there", "Latin, and more\n" * 40, "自由，平等\n" * 30,
])  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_wide_text_without_a_mark_is_never_text_full_of_zeros(tmp_path, text, encoding):
    path = tmp_path / "book.txt"
    for data in (text.encode(encoding), b"A preface.\n" * 500 + text.encode(encoding)):
        path.write_bytes(data)
        for read in (lambda: prepare_data(path, tmp_path / "out"), lambda: read_text(path)):
            with pytest.raises(DataError, match="not UTF-8"):
                read()
    path.write_bytes(text.encode(encoding))
    other = "utf-16-be" if encoding == "utf-16-le" else "utf-16-le"
    with pytest.raises(DataError, match="other order|cannot be read as"):
        prepare_data(path, tmp_path / "out", encoding=other)
    if len(text) > 10:
        prepare_data(path, tmp_path / "out", encoding=encoding)


@pytest.mark.parametrize("encoding", ["iso2022_jp", "iso2022_kr", "hz"])
def test_encodings_of_seven_bits_are_told(tmp_path, encoding):
    text = SAMPLES[{"iso2022_jp": "cp932", "iso2022_kr": "cp949", "hz": "gb18030"}[encoding]]
    text = text.replace("；", "。")
    path = tmp_path / "book.txt"
    path.write_bytes((f"In English.\n{text}\n" * 20).encode(encoding))
    with pytest.raises(DataError, match=rf"--encoding {encoding}"):
        prepare_data(path, tmp_path / "out")
    data = prepare_data(path, tmp_path / "out", encoding=encoding)
    assert data.meta.train_characters + data.meta.val_characters == 20 * (len(text) + 13)


@pytest.mark.parametrize("zeros", [b"\0" * 1000, b"\0"])
def test_a_zero_byte_is_told_with_a_way_out(tmp_path, zeros):
    path = tmp_path / "book.txt"
    path.write_bytes(b"Some text\n" * 300 + zeros + b"Some text\n" * 300)
    with pytest.raises(DataError, match=r"byte 3000 is 0") as caught:
        prepare_data(path, tmp_path / "out")
    command = re.search("`(.*)`", str(caught.value))[1]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "cleaned.txt").read_bytes() == b"Some text\n" * 600


def test_advice_on_packed_text_unpacks_it(tmp_path):
    path = tmp_path / "a book.txt.gz"
    path.write_bytes(gzip.compress((SAMPLES["cp1252"] + "\n").encode("cp1252") * 30))
    with pytest.raises(DataError) as caught:
        prepare_data(path, tmp_path / "out")
    command = re.search("`(gzip.*)`", str(caught.value))[1]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "converted.txt").read_text() == (SAMPLES["cp1252"] + "\n") * 30


def test_a_mark_wins_over_the_encoding_and_utf8_is_not_recoded(tmp_path, plain):
    path = tmp_path / "book.txt"
    for number, stored in enumerate(("utf-16", "utf-8-sig")):
        path.write_bytes(TEXT.encode(stored))
        assert tokens(path, tmp_path / str(number), encoding="cp1252") == plain
    path.write_bytes(TEXT.encode())
    for encoding in ("cp1252", "latin1", "gb18030"):
        with pytest.raises(DataError, match=r"is UTF-8, and would become|cannot be read as"):
            prepare_data(path, tmp_path / "out", encoding=encoding)


@pytest.mark.parametrize("encoding", SAMPLES)
def test_the_encoding_of_a_text_is_told_and_read_when_it_is_named(tmp_path, encoding):
    path = tmp_path / "book.txt"
    text = f"A preface in English.\n{SAMPLES[encoding]}\n" * 40
    path.write_bytes(text.encode(encoding))
    for read in (lambda: prepare_data(path, tmp_path / "out"), lambda: read_text(path)):
        with pytest.raises(DataError, match=rf"--encoding {encoding}, or .*iconv -f {encoding} "):
            read()
    assert TextInput(path, encoding).read_text() == text
    data = prepare_data(path, tmp_path / "out", encoding=encoding)
    assert data.meta.vocab_size == len(set(text))


def test_a_damaged_place_in_utf8_is_not_taken_for_an_encoding(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("Größe\n".encode() * 50 + b"\xff" + "Größe\n".encode() * 50)
    with pytest.raises(DataError, match=r"at byte 400, 0xff .* this place is damaged.*iconv -c"):
        prepare_data(path, tmp_path / "out")


@pytest.mark.parametrize("encoding", ["latin", "", "base64", "rot13", "hex", "nul\0", "x" * 999])
def test_an_encoding_that_there_is_not_is_named(tmp_path, encoding):
    (tmp_path / "book.txt").write_text("text")
    if encoding == "latin":  # Python's name for latin1
        encoding = "latin3000"
    with pytest.raises(DataError, match="there is no encoding"):
        prepare_data(tmp_path / "book.txt", tmp_path / "out", encoding=encoding)


def test_text_that_is_not_in_the_named_encoding_is_an_error(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("été\x81 ".encode("latin1") * 20)
    with pytest.raises(DataError, match=r"book\.txt cannot be read as cp1252: .*0x81"):
        prepare_data(path, tmp_path / "out", encoding="cp1252")


def save(kind: str, path: Path, documents: list[str], field: str = "text") -> Path:
    """`documents` in a file of records of the kind."""
    rows = [{"id": i, field: document} for i, document in enumerate(documents)]
    if kind in ("jsonl", "ndjson", "bare lines"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind.startswith("array"):
        indent = {"array": None, "array of pages": 1, "array of tabs": "\t"}[kind]
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False))
    else:
        delimiter = {"csv": ",", "csv of Excel": ";", "tsv": "\t", "csv of bars": "|"}[kind]
        with open(
            path, "w", newline="", encoding="utf-8-sig" if kind == "csv" else "utf-8"
        ) as file:
            if kind == "csv of Excel":
                file.write("sep=;\r\n")
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["id", field])
            writer.writerows([i, document] for i, document in enumerate(documents))
    return path


KINDS = {
    "jsonl": "a.jsonl", "ndjson": "a.ndjson", "bare lines": "a.json", "array": "a.json",
    "array of pages": "A.JSON", "array of tabs": "a.json", "csv": "a.csv", "tsv": "a.tsv",
    "csv of Excel": "a.CSV", "csv of bars": "a.csv",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_records_of_every_kind_give_the_same_tokens(tmp_path, records, kind, monkeypatch):
    monkeypatch.setattr("gpt2fast.data.records.READ_BYTES", 64)  # an item of an array does not fit
    bpe = {"tokenizer": "bpe", "vocab_size": 300}
    path = save(kind, tmp_path / KINDS[kind], DOCUMENTS)
    assert tokens(path, tmp_path / "out", **bpe) == records
    packed = tmp_path / f"{path.name}.xz"
    packed.write_bytes(lzma.compress(path.read_bytes()))
    assert tokens(packed, tmp_path / "packed", **bpe) == records
    path = save(kind, tmp_path / KINDS[kind], DOCUMENTS, field="Body")
    assert tokens(path, tmp_path / "body", text_field="Body", **bpe) == records
    with pytest.raises(DataError, match=r"no (column )?'text', only .*Body.*--text-field"):
        prepare_data(path, tmp_path / "none")


@pytest.mark.parametrize("kind", ["csv", "array"])
def test_an_interruption_among_records_loses_nothing(tmp_path, records, kind, monkeypatch):
    interruptible(monkeypatch, 300)
    path = save(kind, tmp_path / KINDS[kind], DOCUMENTS)
    left = 7

    def progress(stage, done, total):
        nonlocal left
        left -= stage == "encode"
        if not left:
            raise Killed

    bpe = {"tokenizer": "bpe", "vocab_size": 300}
    with pytest.raises(Killed):
        prepare_data(path, tmp_path / "out", progress=progress, **bpe)
    assert json.loads((tmp_path / "out/.unfinished/position.json").read_text())["offset"] > 0
    assert tokens(path, tmp_path / "out", **bpe) == records


BROKEN = {
    "short row": ("a.csv", "id,text\n1,x\n2\n", r"a\.csv, row 2 \(line 3\): 1 values, .* 2 colu"),
    "long row": ("a.csv", "text\nx\ny, z\n", r"row 2 \(line 3\): 2 values, .* 1 columns"),
    "open quote": ("a.csv", 'id,text\n1,y\n2,"x\n3,z\n', r"row 2 \(line 3\): a double quote is"),
    "quote in tsv": (
        "a.tsv",
        'id\ttext\n1\t"He said\n2\tand left"\n',
        r"row 1 \(line 2\): .* a tab",
    ),
    "list within": ("a.json", '{"data": [{"text": "a"}]}', r"`jq -c '\.data\[\]'"),
    "two columns": ("a.csv", "text,text\nx,y\n", "two columns are called 'text'"),
    "blank": ("a.csv", "\n\n", "no first row that names the columns"),
    "no table": ("a.csv", "It was a dark night\n", "names no column 'text', only 'It was a"),
    "cut array": ("a.json", '[{"text": "a"}, {"text": ', r"a\.json, item 2: not JSON, or cut sho"),
    "open array": ("a.json", '[{"text": "a"}', "item 2: not JSON"),
    "two arrays": ("a.json", '[{"text": "a"}] [1]', "something follows the end of the JSON array"),
    "no comma": ("a.json", '[{"text": "a"} {"text": "b"}]', "item 2: not JSON"),
    "leading comma": ("a.json", '[, {"text": "a"}]', "item 1: not JSON"),
    "trailing comma": ("a.json", '[{"text": "a"},]', "item 2: not JSON"),
    "array of texts": ("a.json", '["a", "b"]', "item 1: a JSON str, but each item must be an obj"),
    "null": ("a.json", '[{"text": null}]', "item 1: 'text' is null"),
    "deep": ("a.json", "[" * 200_000, "item 1: nested too deeply"),
    "object": ("a.json", '{"data": \n[{"text": "a"}]}', "neither an array of .*one object a line"),
    "empty array": ("a.json", "[ ]", "no text in the input"),
    "latin1": ("a.csv", b"text\n" + b"caf\xe9\n" * 9, r"a\.csv is not UTF-8 text: at byte 8, 0xe9"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_records_is_named_with_its_place(tmp_path, name):
    file, content, message = BROKEN[name]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        prepare_data(path, tmp_path / "out")
    assert os.listdir(tmp_path) == [file]


def docx() -> bytes:
    return zipped(b"<x/>", "word/document.xml")


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    return file.getvalue()


def saved(save, value) -> bytes:
    file = io.BytesIO()
    save(file, value)
    return file.getvalue()


OTHERS = {
    "book.pdf": (lambda: b"%PDF-1.7\n%\xe2\xe3", "a PDF, .*pdftotext book.pdf text.txt"),
    "book.txt": (lambda: b"%PDF-1.7\n%\xe2\xe3", "a PDF"),
    "the book.docx": (docx, "a Word document .*pandoc 'the book.docx' -t plain"),
    "b.epub": (lambda: zipped(b"", "META-INF/container.xml"), "an EPUB book"),
    "b.rtf": (lambda: rb"{\rtf1\ansi hello}", "a rich text document"),
    "b.doc": (lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    "b.tar": (tar, "a tar archive; unpack it first|a tar archive, not text; unpack it first"),
    "b.tgz": (lambda: gzip.compress(tar()), "a tar archive"),
    "b.7z": (lambda: b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
    "b.png": (lambda: b"\x89PNG\r\n\x1a\n\0", "an image"),
    "b.npy": (lambda: saved(np.save, np.arange(9)), r"a NumPy array .*train --data FOLDER"),
    "b.pkl": (lambda: pickle.dumps({"a": 1}), "a Python pickle"),
    "b.pt": (lambda: saved(lambda f, v: torch.save(v, f), {"a": 1}), "a PyTorch checkpoint"),
    "b.gguf": (lambda: b"GGUF\3\0\0\0", "a GGUF file"),
    "b.sqlite": (lambda: b"SQLite format 3\0", "an SQLite database"),
    "b.bin": (lambda: (20240520).to_bytes(4, "little") * 9, "llm.c's format"),
    "n.bin": (lambda: bytes([5, 0, 9, 1] * 99), "a file of tokens or weights|is 0, as in UTF-16LE"),
    "b.txt.gz.gz": (lambda: gzip.compress(gzip.compress(b"text")), "is compressed twice"),
    "b.zip": (lambda: zipped(b"a", "b.txt")[:-22] + b"", "cannot be unpacked"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_text_is_named_with_a_way_to_it(tmp_path, name):
    make, message = OTHERS[name]
    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(DataError, match=message):
        prepare_data(path, tmp_path / "out")
    with pytest.raises(DataError, match=message):
        read_text(path)
    assert os.listdir(tmp_path) == [name]


def test_an_archive_of_several_files_names_them(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("a.txt", "b.txt"):
            archive.writestr(name, "text")
    with pytest.raises(DataError, match=r"holds 2 files \('a\.txt', 'b\.txt'\); unpack it"):
        prepare_data(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("text", ["GGUF is a format.\n", "MZ, BM and RIFF\n", "PARIS\n", "{x}\n"])
def test_text_that_begins_like_another_kind_is_text(tmp_path, text):
    (tmp_path / "a").write_text(text * 20)
    data = prepare_data(tmp_path / "a", tmp_path / "out")
    assert data.meta.train_characters + data.meta.val_characters == len(text * 20)


def test_records_are_found_by_what_is_in_a_file(tmp_path, records):
    """Inputs whose name does not tell: standard input, a zip archive's file, unknown suffixes."""
    bpe = {"tokenizer": "bpe", "vocab_size": 300}
    for kind in ("csv", "tsv", "array", "jsonl"):
        path = save(kind, tmp_path / f"the {kind}.data", DOCUMENTS)
        told: list[str] = []
        assert tokens(path, tmp_path / kind, notify=told.append, **bpe) == records
        assert len(told) == 1 and f"the {kind}.data is read as" in told[0]
        archive = tmp_path / f"{kind}.zip"
        archive.write_bytes(zipped(path.read_bytes(), f"folder/{Path(KINDS[kind]).name}"))
        assert tokens(archive, tmp_path / f"{kind} zip", **bpe) == records
    for suffix, kind in ((".tab", "tsv"), (".psv", "csv of bars")):
        path = save(kind, tmp_path / f"a{suffix}", DOCUMENTS)
        assert tokens(path, tmp_path / suffix, **bpe) == records


def test_json_lines_that_are_called_text_are_told_or_read(tmp_path, records):
    bpe = {"tokenizer": "bpe", "vocab_size": 300}
    path = save("jsonl", tmp_path / "a.txt", DOCUMENTS, field="body")
    assert tokens(path, tmp_path / "out", text_field="body", **bpe) == records
    with pytest.warns(UserWarning, match=r"a\.txt holds JSON lines, and is read as plain text"):
        data = prepare_data(path, tmp_path / "text")
    assert data.meta.train_characters + data.meta.val_characters == len(path.read_text())


def test_new_lines_in_records_are_those_of_text(tmp_path):
    for number, newline in enumerate(("\n", "\r\n", "\r")):
        records = [{"text": f"one{newline}two {n}{newline}"} for n in range(40)]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    first, *others = (tokens(tmp_path / f"{n}.jsonl", tmp_path / str(n)) for n in range(3))
    assert others == [first, first]


def test_a_text_that_does_not_end_its_line_is_not_glued_to_the_next(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"An essay {name}" * 9)
    (tmp_path / "one.txt").write_text("\n".join(f"An essay {name}" * 9 for name in "abc"))
    files = [tmp_path / f"{name}.txt" for name in "abc"]
    assert tokens(files, tmp_path / "three") == tokens(tmp_path / "one.txt", tmp_path / "joined")
    assert prepare_data(files, tmp_path / "weighted-no").meta.train_characters


def test_a_folder_of_records_is_not_its_readme(tmp_path, records):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("A data set.\n" * 50)
    (folder / "LICENSE.txt").write_text("Do as you like.\n" * 50)
    save("jsonl", folder / "data" / "train.jsonl", DOCUMENTS)
    told: list[str] = []
    bpe = {"tokenizer": "bpe", "vocab_size": 300}
    assert tokens(folder, tmp_path / "out", notify=told.append, **bpe) == records
    assert len(told) == 1 and "reading 1 files (.jsonl), not LICENSE.txt, README.md" in told[0]
    (folder / "book.txt").write_text("A book.\n" * 50)
    with pytest.warns(UserWarning, match=r"not data/train\.jsonl"):
        prepare_data(folder, tmp_path / "text")


def test_a_folder_reads_regular_files_of_one_tier(tmp_path, plain):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "book.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (folder / "table.csv").write_text("text\nnot read\n")
    os.mkfifo(folder / "pipe.txt")
    with pytest.warns(UserWarning, match=r"reading 1 files \(\.gz\), not table\.csv"):
        assert tokens(folder, tmp_path / "out") == plain


def test_one_file_twice_is_refused_and_a_copy_is_told(tmp_path):
    first, copy, other = (tmp_path / name for name in ("a.txt", "b.txt", "c.txt"))
    first.write_text(TEXT)
    copy.write_text(TEXT)
    other.write_text(TEXT.replace("Second", "Third!"))
    for inputs in ([first, first], [first, tmp_path], [str(first), tmp_path / "." / "a.txt"]):
        with pytest.raises(DataError, match=r"a\.txt is named twice"):
            prepare_data(inputs, tmp_path / "out")
    told: list[str] = []
    prepare_data([first, other], tmp_path / "out", notify=told.append)
    assert not told
    prepare_data([first, copy, other], tmp_path / "two", notify=told.append)
    assert len(told) == 1 and "a.txt and " in told[0] and "b.txt seem to be copies" in told[0]


def run(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gpt2fast.prepare", *arguments]
    return subprocess.run(command, capture_output=True, timeout=patience(), **options)


def test_standard_input_of_records_is_read_as_such(tmp_path, records):
    save("jsonl", tmp_path / "a.jsonl", DOCUMENTS)
    lines = (tmp_path / "a.jsonl").read_bytes()
    for number, given in enumerate((lines, gzip.compress(lines))):
        out = tmp_path / str(number)
        done = run("-", "--out", str(out), "--tokenizer", "bpe", "--vocab-size", "300", input=given)
        assert done.returncode == 0
        assert b"note: - is read as JSON lines: 'text' of each is a document" in done.stderr
        assert (out / "train.bin").read_bytes() + (out / "val.bin").read_bytes() == records


def test_standard_input_that_is_closed_is_told(tmp_path):
    script = f"exec {sys.executable} -m gpt2fast.prepare - --out {tmp_path / 'out'} <&-"
    done = subprocess.run(["sh", "-c", script], capture_output=True, timeout=patience())
    assert (done.returncode, done.stderr) == (
        1, b"error: there is no text in the input (-)\n",
    )  # fmt: skip


def test_the_encoding_is_named_on_the_command_line(tmp_path):
    path = tmp_path / "neko.txt"
    path.write_bytes(SAMPLES["cp932"].encode("cp932") * 20)
    done = run(str(path), "--encoding", "shift_jis", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    done = run(str(path), "--encoding", "sjizz", "--out", str(tmp_path / "no"))
    assert done.returncode == 2 and b"there is no encoding 'sjizz'" in done.stderr


# -- token files of NumPy ------------------------------------------------------------------------


def npy(folder: Path, tokens: np.ndarray) -> Path:
    folder.mkdir()
    np.save(folder / "edu_val_000000.npy", tokens[:300])
    np.save(folder / "edu_train_000001.npy", tokens[300:700])
    np.save(folder / "edu_train_000002.npy", tokens[700:])
    return folder


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4", "<i8", "<u8"])
def test_token_shards_of_numpy_are_read(tmp_path, dtype):
    tokens = np.random.default_rng(1).integers(0, 40_000, 1000).astype(dtype)
    folder = npy(tmp_path / "edu", tokens)
    for place in (folder, folder / "edu_train_*.npy"):
        data = DataModule(str(place), 700 - 1 - 400, 1, sampling="epoch", notify=lambda _: None)
        inputs, targets = data.val_dataloader()[0]
        right = torch.from_numpy(tokens[:300].astype(np.int64))
        assert torch.equal(inputs[0], right[:-1]) and torch.equal(targets[0], right[1:])
        read = data.train_dataloader()[0][0][0]
        assert torch.equal(read, torch.from_numpy(tokens[300 : 300 + len(read)].astype(np.int64)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda t: t.astype(np.float32),
            r"the shape \(400,\) and of NumPy's type <f4; ",
        ),
        (lambda t: t.astype(np.int16), "type <i2"),
        (lambda t: t.astype(">u2"), "little-endian"),
        (lambda t: t[:, None], r"of the shape \(400, 1\)"),
        (lambda t: np.array([{}] * 4), r"type \|O"),
    ],
)
def test_other_arrays_of_numpy_are_no_tokens(tmp_path, make, message):
    folder = npy(tmp_path / "edu", np.arange(1000, dtype=np.uint16))
    np.save(folder / "edu_train_000001.npy", make(np.arange(400, dtype=np.uint16)))
    with pytest.raises(DataError, match=message):
        DataModule(str(folder), 8, 1, notify=lambda _: None)


def test_a_shard_of_numpy_that_is_cut_or_has_a_damaged_header_is_named(tmp_path):
    folder = npy(tmp_path / "edu", np.arange(1000, dtype=np.uint16))
    whole = (folder / "edu_train_000001.npy").read_bytes()
    for content, message in (
        (whole[:-2], "tells of 400 uint16 tokens, which makes 928 bytes, but the file has 926"),
        (whole[:40], "its header is damaged"),
        (whole.replace(b"{'descr'", b"[__import__"), "its header is damaged"),
    ):
        (folder / "edu_train_000001.npy").write_bytes(content)
        with pytest.raises(DataError, match=message):
            DataModule(str(folder), 8, 1, notify=lambda _: None)


def test_a_negative_number_is_no_token(tmp_path):
    tokens = np.arange(1000, dtype=np.int64)
    tokens[500] = -7
    data = DataModule(str(npy(tmp_path / "edu", tokens)), 8, 1, notify=lambda _: None)
    with pytest.raises(DataError, match="token 200 is -7, outside"):
        data._check_ids(50257, "the model's vocab_size")
