"""Broken tokenizer files give one clear error each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from corrupted_files import assert_refused
from gpt2fast import Tokenizer
from gpt2fast.tokenizer import BPETokenizer, CharTokenizer

# Tokenizers


@pytest.fixture(scope="module")
def saved_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = "the cat sat on the mat, the end of the cat"
    BPETokenizer.train([text] * 3, vocab_size=280).save_pretrained(folder)
    return folder


def tokenizer_refused(folder: Path, file: Path) -> str:
    return assert_refused(lambda: Tokenizer.from_pretrained(folder), file)


@pytest.mark.parametrize("kept", [0, 1, 2, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, -1])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer_config.json"])
def test_a_truncated_tokenizer_file(tmp_path, saved_tokenizer, name, kept):
    shutil.copytree(saved_tokenizer, tmp_path, dirs_exist_ok=True)
    if name == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
    path = tmp_path / name
    content = path.read_bytes().rstrip()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    tokenizer_refused(tmp_path, path)


def change_vocab(model: dict, **changes: object) -> None:
    model["vocab"] = model["vocab"] | changes


TOKENIZER_CHANGES: dict[str, Callable[[dict], object]] = {
    "no model": lambda t: t.pop("model"),
    "model is a list": lambda t: t.update(model=[]),
    "another model": lambda t: t["model"].update(type="Unigram"),
    "no vocab": lambda t: t["model"].pop("vocab"),
    "an empty vocab": lambda t: t["model"].update(vocab={}),
    "vocab is a list": lambda t: t["model"].update(vocab=["a"]),
    "an id that is text": lambda t: change_vocab(t["model"], the="7"),
    "an id that is true": lambda t: change_vocab(t["model"], the=True),
    "a negative id": lambda t: change_vocab(t["model"], the=-1),
    "a huge id": lambda t: change_vocab(t["model"], the=1 << 60),
    "an id twice": lambda t: change_vocab(t["model"], the=t["model"]["vocab"]["at"]),
    "a surrogate": lambda t: change_vocab(t["model"], **{"\ud800": 279}),
    "no merges": lambda t: t["model"].pop("merges"),
    "merges is an object": lambda t: t["model"].update(merges={"a": "t"}),
    "a merge of unknown tokens": lambda t: t["model"]["merges"].append(["qq", "zz"]),
    "a merge into an unknown token": lambda t: t["model"]["merges"].append(["q", "z"]),
    "a merge of three": lambda t: t["model"]["merges"].append(["a", "t", "e"]),
    "a merge of one": lambda t: t["model"]["merges"].append("at"),
    "a merge of numbers": lambda t: t["model"]["merges"].append([1, 2]),
    "a merge that is null": lambda t: t["model"]["merges"].append(None),
    "added_tokens is an object": lambda t: t.update(added_tokens={}),
    "an added token of text": lambda t: t["added_tokens"].append("<pad>"),
    "an added token without text": lambda t: t["added_tokens"].append({"id": 300}),
    "an added token with another's id": lambda t: t["added_tokens"].append(
        {"id": 3, "content": "<pad>"}
    ),
    "an added token far away": lambda t: t["added_tokens"].append(
        {"id": 1 << 40, "content": "<pad>"}
    ),
    "an unknown pre_tokenizer": lambda t: t["pre_tokenizer"].update(type="Whites"),
    "pre_tokenizer is a number": lambda t: t.update(pre_tokenizer=1),
    "an unknown decoder": lambda t: t["decoder"].update(type="Words"),
    "a normalizer without its pattern": lambda t: t.update(normalizer={"type": "Replace"}),
}


@pytest.mark.parametrize("change", TOKENIZER_CHANGES.values(), ids=TOKENIZER_CHANGES)
def test_a_broken_tokenizer_json(tmp_path, saved_tokenizer, change):
    shutil.copytree(saved_tokenizer, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content))
    tokenizer_refused(tmp_path, path)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"[" * 1_000_000, b'{"a":' * 500_000, b"[]", b"<html>404</html>", b"q z"],
)
def test_a_tokenizer_file_that_is_something_else(tmp_path, saved_tokenizer, name, content):
    shutil.copytree(saved_tokenizer, tmp_path, dirs_exist_ok=True)
    if name != "tokenizer.json":
        (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_bytes(content)
    tokenizer_refused(tmp_path, tmp_path / name)


@pytest.mark.parametrize(
    "vocab",
    [{}, [], {"a": "0"}, {"a": 1}, {"a": 0, "b": 0}, {"ab": 0}, {"": 0}, {"a": -1}, {"a": 1 << 60}],
)
def test_a_broken_vocabulary_of_characters(tmp_path, vocab):
    CharTokenizer.train(["abc"]).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    tokenizer_refused(tmp_path, tmp_path / "vocab.json")
