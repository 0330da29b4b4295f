"""Texts that come as records: JSON lines, parquet files, and data sets of Hugging Face."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
from array import array
from pathlib import Path

import pytest

import gpt2fast.data.huggingface as huggingface
from gpt2fast.cli import prepare as command
from gpt2fast.data import prepare_data, records, tabular
from gpt2fast.data.text import END_OF_TEXT
from gpt2fast.errors import DataError
from gpt2fast.tokenizer import BPETokenizer, Tokenizer
from small_library import Killed, contents, interrupt_after, interruptible, memory_growth

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat,",
    "and",
    "it",
    "sang:",
    "\n\n",
    "isn't",
    "12",
    "é",
    "的",
    ".",
]
_draw = random.Random(3)
DOCUMENTS = [
    f"Story {n}\n" + " ".join(_draw.choices(WORDS, k=_draw.randrange(1, 90))) for n in range(60)
]
KINDS = ("jsonl", "jsonl.gz", "parquet")


def save(path: Path, texts, field="text") -> Path:
    """`texts` as the field of records, in the format that the name of the file tells."""
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pa.table({"id": list(range(len(texts))), field: texts})
        parquet.write_table(table, path, row_group_size=17 if len(texts) < 1000 else len(texts))
        return path
    lines = "".join(json.dumps({"id": n, field: text}) + "\n" for n, text in enumerate(texts))
    packed = gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode()
    path.write_bytes(packed)
    return path


def text_of(directory: Path) -> str:
    tokenizer = Tokenizer.from_pretrained(directory)
    meta = json.loads((directory / "meta.json").read_text())
    tokens = array("H" if meta["dtype"] == "uint16" else "I")
    for split in ("train", "val"):
        tokens.frombytes((directory / f"{split}.bin").read_bytes())
    return tokenizer.decode(tokens)


@pytest.fixture
def small_blocks(monkeypatch):
    interruptible(monkeypatch, 700)
    # No setting, as the pace: no token depends on it.
    monkeypatch.setattr(tabular, "ROWS_AT_ONCE", 5)


@pytest.fixture(scope="module")
def bpe_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    BPETokenizer.train(["\n".join(DOCUMENTS)], 400).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", ["position", "documents"])
def test_records_are_documents(tmp_path, small_blocks, kind, split):
    path = save(tmp_path / f"a.{kind}", [*DOCUMENTS[:9], "", " \n", *DOCUMENTS[9:]])
    data = prepare_data(path, tmp_path / "out", split=split, val_fraction=0.2)
    found = text_of(data.directory).split(END_OF_TEXT)
    assert found.pop() == ""
    assert found == DOCUMENTS if split == "position" else sorted(found) == sorted(DOCUMENTS)
    if split == "documents":
        assert data.meta.documents["train"] + data.meta.documents["val"] == len(DOCUMENTS)
    assert data.meta.sources == [path.name]


@pytest.mark.parametrize("kind", KINDS)
def test_records_can_be_lines_of_one_text(tmp_path, small_blocks, bpe_dir, kind):
    lines = ["", " = Title = \n", "", " A paragraph ,  with a @-@ b . \n", "no newline", "  "] * 40
    path = save(tmp_path / f"a.{kind}", lines)
    data = prepare_data(path, tmp_path / "out", tokenizer=str(bpe_dir), records="lines")
    text = "".join(line if line.endswith("\n") else line + "\n" for line in lines)
    tokenizer = Tokenizer.from_pretrained(bpe_dir)
    boundary = int(len(text) * 0.9)
    tokens = array("H", (data.directory / "train.bin").read_bytes())
    assert tokens.tolist() == tokenizer.encode(text[:boundary])
    assert text_of(data.directory) == text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("records", ["documents", "lines"])
def test_interrupted_records_end_with_the_same_bytes(tmp_path, small_blocks, kind, records):
    path = save(tmp_path / f"a.{kind}", DOCUMENTS)
    arguments = {"split": "documents" if records == "documents" else "position", "records": records}
    straight = prepare_data(path, tmp_path / "straight", **arguments)
    for calls in range(1, 500, 3):
        try:
            data = prepare_data(
                path, tmp_path / "out", **arguments, progress=interrupt_after(calls)
            )
            break
        except Killed:
            pass
    assert data.resumed and calls > 4
    assert contents(data.directory) == contents(straight.directory)


def test_an_end_of_text_inside_a_record_is_one_token(tmp_path):
    path = save(tmp_path / "a.jsonl", [f"one{END_OF_TEXT}two", f"three{END_OF_TEXT}\n", "four"])
    data = prepare_data(path, tmp_path / "out", split="documents", val_fraction=0.3)
    found = text_of(data.directory)
    assert found.count(END_OF_TEXT) == 4
    assert sum(data.meta.documents[s] for s in ("train", "val")) == 3


def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "abc"}\r\n\r\n   \n{"text": "bca"}')
    data = prepare_data(path, tmp_path / "out", val_fraction=0.5)
    assert text_of(data.directory) == f"abc{END_OF_TEXT}bca{END_OF_TEXT}"


def test_another_field_can_hold_the_text(tmp_path, capsys):
    path = save(tmp_path / "a.jsonl", DOCUMENTS, field="body")
    arguments = [str(path), "--out", str(tmp_path / "out")]
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert f"{path}, line 1: there is no 'text', only body, id; name the one" in error
    assert error.count("\n") == 1
    assert command.main([*arguments, "--text-field", "body"]) == 0
    assert text_of(tmp_path / "out").split(END_OF_TEXT)[0] == DOCUMENTS[0]


GOOD = b'{"text": "fine"}\n'
BAD_LINES = {
    "cut": (
        b'{"text": "fi',
        "line 3: it is not valid JSON: .*; each line must be an object with 'text'",
    ),
    "list": (b'["a"]\n', "line 3: a JSON list, but each line must be an object"),
    "null": (b'{"text": null}\n', "line 3: 'text' is null, not text"),
    "number": (b'{"text": 7}\n', "line 3: 'text' is of type int, not text"),
    "latin1": (b'{"text": "\xe9"}\n', "line 3: not UTF-8 .byte 0xe9 at place 10"),
    "surrogate": (b'{"text": "\\ud800"}\n', "line 3: 'text' holds half a surrogate pair"),
    "deep": (b"[" * 100_000 + b"\n", "line 3: it is nested more than 100 deep"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, name, packed):
    line, message = BAD_LINES[name]
    content = GOOD + GOOD + line
    path = tmp_path / ("bad.jsonl.gz" if packed else "bad.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=message):
        prepare_data(path, tmp_path / "out")
    assert os.listdir(tmp_path) == [path.name]


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    # No setting; a line that is too long has 256 MB.
    monkeypatch.setattr(records, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "array.jsonl"
    path.write_bytes(b"[" + b'{"text": "a"},' * 200_000)
    with pytest.raises(DataError, match="line 1: longer than 1 MB; .*jq"):
        prepare_data(path, tmp_path / "out")


def test_a_damaged_archive_is_named(tmp_path):
    path = save(tmp_path / "a.jsonl.gz", DOCUMENTS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be unpacked: .*fetch it again"):
        prepare_data(path, tmp_path / "out")
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match="cannot be unpacked: it is not what its name says"):
        prepare_data(path, tmp_path / "out")


def test_empty_records_alone_are_no_text(tmp_path):
    path = save(tmp_path / "a.jsonl", ["", "  "])
    with pytest.raises(DataError, match=r"there is no text in the input \(a\.jsonl\)"):
        prepare_data(path, tmp_path / "out")


def test_a_bad_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    path = save(tmp_path / "a.parquet", DOCUMENTS)
    with pytest.raises(DataError, match=r"a\.parquet: there is no 'body', only id, text"):
        prepare_data(path, tmp_path / "out", text_field="body")
    with pytest.raises(DataError, match=r"a\.parquet, row 0: 'id' is of type int, not text"):
        prepare_data(path, tmp_path / "out", text_field="id")
    save(path, ["fine", None])
    with pytest.raises(DataError, match=r"row 1: 'text' is null, not text"):
        prepare_data(path, tmp_path / "out")
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read: "):
        prepare_data(path, tmp_path / "out")


def test_a_folder_without_text_files_stands_for_its_records(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    save(folder / "b.jsonl", DOCUMENTS[:5])
    save(folder / "a.jsonl.gz", DOCUMENTS[5:9])
    data = prepare_data(folder, tmp_path / "out")
    assert data.meta.sources == ["a.jsonl.gz", "b.jsonl"]
    (folder / "essay.md").write_text("Some text. " * 9)
    with pytest.warns(UserWarning, match=r"not a\.jsonl\.gz, b\.jsonl"):
        data = prepare_data(folder, tmp_path / "out", overwrite=True)
    assert data.meta.sources == ["essay.md"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("records", ["documents", "lines"])
def test_memory_does_not_grow_with_the_records(tmp_path, kind, records):
    draw = random.Random(1).random
    texts = [" ".join(str(draw()) for _ in range(60)) for _ in range(30_000)]  # 36 MB
    files = [save(tmp_path / f"s.{kind}", texts[:4000]), save(tmp_path / f"l.{kind}", texts)]
    assert memory_growth(tmp_path / "out", *files, records=records) < 15_000


# -- data sets -----------------------------------------------------------------------------------


@pytest.fixture
def library():
    return pytest.importorskip("datasets")


@pytest.fixture
def saved(library, tmp_path):
    """A saved data set with a validation split, and the rows of both."""
    splits = {"train": DOCUMENTS[:45], "validation": DOCUMENTS[45:]}
    library.DatasetDict(
        {name: library.Dataset.from_dict({"text": rows}) for name, rows in splits.items()}
    ).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def split_text(directory: Path, split: str) -> list[str]:
    tokens = array("H", (directory / f"{split}.bin").read_bytes())
    return Tokenizer.from_pretrained(directory).decode(tokens).split(END_OF_TEXT)[:-1]


def test_the_splits_of_a_data_set_are_kept(saved, tmp_path, small_blocks, capsys):
    out = tmp_path / "out"
    assert command.main(["--dataset", str(saved), "--out", str(out)]) == 0
    assert split_text(out, "train") == DOCUMENTS[:45]
    assert split_text(out, "val") == DOCUMENTS[45:]
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["split"], meta["val_fraction"]) == ("given", None)
    assert f"next: python -m gpt2fast.train --data {out}" in capsys.readouterr().out


def test_a_data_set_can_be_divided_anew(saved, tmp_path):
    data = prepare_data((), tmp_path / "out", dataset=str(saved), split="documents")
    both = split_text(data.directory, "train") + split_text(data.directory, "val")
    assert sorted(both) == sorted(DOCUMENTS[:45])
    with pytest.raises(DataError, match="val_fraction is 0.2, but the data set brings its own"):
        prepare_data((), tmp_path / "new", dataset=str(saved), val_fraction=0.2)


def test_a_data_set_without_validation_has_a_share_held_out(library, tmp_path, small_blocks):
    save(tmp_path / "a.jsonl", DOCUMENTS)
    rows = library.load_dataset(
        "json", data_files=str(tmp_path / "a.jsonl"), split="train", cache_dir=str(tmp_path / "c")
    )
    rows.save_to_disk(tmp_path / "saved")
    data = prepare_data((), tmp_path / "out", dataset=str(tmp_path / "saved"))
    file = prepare_data(tmp_path / "a.jsonl", tmp_path / "file")
    mine, theirs = contents(data.directory), contents(file.directory)
    mine.pop("meta.json"), theirs.pop("meta.json")
    assert mine == theirs


def test_the_rows_of_wikitext_are_lines(library, tmp_path, small_blocks):
    rows = ["", " = Robert Boulter = \n", "", " Robert Boulter is an English actor . \n"] * 20
    table = library.Dataset.from_dict({"text": rows})
    library.DatasetDict({"train": table, "validation": table}).save_to_disk(tmp_path / "wikitext")
    data = prepare_data((), tmp_path / "out", dataset=str(tmp_path / "wikitext"))
    text = "".join(row or "\n" for row in rows)
    assert text_of(data.directory) == text * 2
    forced = prepare_data(
        (), tmp_path / "two", dataset=str(tmp_path / "wikitext"), records="documents"
    )
    assert text_of(forced.directory).count(END_OF_TEXT) == 80


def test_a_data_set_without_train_says_so(library, tmp_path):
    table = library.Dataset.from_dict({"text": DOCUMENTS})
    library.DatasetDict({"test": table, "extra": table}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="has no split called train, only test, extra"):
        prepare_data((), tmp_path / "out", dataset=str(tmp_path / "saved"))
    library.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(tmp_path / "one")
    with pytest.raises(DataError, match="there is no 'body', only text"):
        prepare_data((), tmp_path / "out", dataset=str(tmp_path / "one"), text_field="body")


def test_a_data_set_out_of_reach_explains_itself(library, tmp_path, monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path)
    arguments = ["--dataset", "Salesforce/wikitext", "--dataset-config", "wikitext-2-raw-v1"]
    assert command.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "error: data set Salesforce/wikitext (wikitext-2-raw-v1) could not be loaded" in error
    assert "Without a network" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("missing", "use"), [("datasets", "--dataset"), ("pyarrow", "parquet")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys, missing, use):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    what = ["--dataset", "some/thing"] if use == "--dataset" else [str(tmp_path / "a.parquet")]
    assert command.main([*what, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert 'pip install "gpt2fast[datasets]"' in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.txt", "--dataset", "x"], "both a.txt and --dataset x were given"),
        (["a.txt", "--dataset-config", "x"], "--dataset-config chooses a part of a --dataset"),
        (["a.txt", "--workers", "0"], "--workers is 0, but must be at least 1"),
        (["a.txt=0.5", "b.txt"], "b.txt has no weight, but other inputs have"),
        (["a.txt=nan"], "the weight of a.txt is nan; it must be a finite number above 0"),
        (["a.txt=0"], "the weight of a.txt is 0.0"),
        (["a.txt=1", "a.txt=2"], "a.txt is named twice"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error and error.count("\n") == 1


def test_the_names_of_validation_splits_are_tried_in_order(library, tmp_path):
    assert huggingface.VALIDATION_NAMES[0] == "validation"
    table = {name: library.Dataset.from_dict({"text": [name] * 9}) for name in ("train", "dev")}
    library.DatasetDict(table).save_to_disk(tmp_path / "saved")
    data = prepare_data((), tmp_path / "out", dataset=str(tmp_path / "saved"))
    assert split_text(data.directory, "val") == ["dev"] * 9
