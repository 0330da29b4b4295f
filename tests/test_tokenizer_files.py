"""Tokenizer files: every layout loads as in transformers, and broken ones are refused."""

# ruff: noqa: F401, F811 (imported fixtures)

from __future__ import annotations

import json
import logging
import random
import shutil
import warnings
from pathlib import Path

import pytest

from gpt2fast.errors import TokenizerError
from gpt2fast.tokenizer import (
    END_OF_TEXT,
    AddedToken,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
)
from gpt2fast.tokenizer.merges import BYTE_TO_CHAR
from small_tokenizers import TRAINING_TEXT, trained

# -- files -----------------------------------------------------------------------------------------


def byte_vocab(*more: str) -> dict[str, int]:
    return {token: id for id, token in enumerate([*BYTE_TO_CHAR.values(), *more])}


def token_json(content: str, **flags: bool) -> dict:
    return {
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
        **flags,
    }


def tokenizer_json(**changes) -> dict:
    """A valid tokenizer.json, with changes given by dotted names (`__` for the dot)."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content: dict = {
        "version": "1.0",
        "added_tokens": [
            {"id": 258, **token_json(END_OF_TEXT)},
        ],
        "normalizer": None,
        "pre_tokenizer": dict(byte_level),
        "post_processor": dict(byte_level),
        "decoder": dict(byte_level),
        "model": {"type": "BPE", "vocab": byte_vocab("th", "the"), "merges": ["t h", "th e"]},
    }
    for name, value in changes.items():
        *parents, last = name.split("__")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return content


def write(directory: Path, files: dict[str, object]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, str | bytes) else json.dumps(content)
        (directory / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return directory


VOCAB_AND_MERGES = {
    "vocab.json": byte_vocab("th", "the"),
    "merges.txt": "#version: 0.2\nt h\nth e\n",
}
GPT2_CLASS = {"tokenizer_class": "GPT2Tokenizer"}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": tokenizer_json(), "tokenizer_config.json": GPT2_CLASS},
        {"tokenizer.json": tokenizer_json(added_tokens=[]), "tokenizer_config.json": GPT2_CLASS},
        {
            "tokenizer.json": tokenizer_json(),
            "tokenizer_config.json": {**GPT2_CLASS, "eos_token": None},
        },
        {
            "tokenizer.json": tokenizer_json(),
            "tokenizer_config.json": {
                **GPT2_CLASS,
                "eos_token": "<end>",
                "pad_token": {"__type": "AddedToken", **token_json("<pad>", lstrip=True)},
                "additional_special_tokens": [
                    "<user>",
                    {"__type": "AddedToken", **token_json("<bot>", rstrip=True)},
                ],
            },
        },
        {
            "tokenizer.json": tokenizer_json(),
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": END_OF_TEXT,
                "pad_token": "<pad>",
            },
        },
        {
            "tokenizer.json": tokenizer_json(pre_tokenizer__add_prefix_space=True),
            "tokenizer_config.json": {**GPT2_CLASS, "add_prefix_space": True},
        },
        {**VOCAB_AND_MERGES, "tokenizer_config.json": GPT2_CLASS},
        {
            **VOCAB_AND_MERGES,
            "tokenizer_config.json": {**GPT2_CLASS, "add_prefix_space": True, "eos_token": "the"},
        },
        {
            **VOCAB_AND_MERGES,
            "tokenizer_config.json": {
                **GPT2_CLASS,
                "added_tokens_decoder": {"258": token_json("<user>")},
            },
        },
        {
            **VOCAB_AND_MERGES,
            "tokenizer_config.json": GPT2_CLASS,
            "added_tokens.json": {"<user>": 259, "<end>": 258},
            "special_tokens_map.json": {"eos_token": "<end>", "pad_token": "<pad>"},
        },
    ],
    ids=[
        "tokenizer.json",
        "no end of text",
        "no end token",
        "more special tokens",
        "fast class",
        "prefix space",
        "vocab and merges",
        "eos from the vocabulary",
        "added_tokens_decoder",
        "legacy files",
    ],
)
def test_every_layout_gives_what_auto_tokenizer_gives(files, tmp_path):
    from transformers import AutoTokenizer

    directory = write(tmp_path / "model", files)
    ours, theirs = Tokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ours.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert ours.vocab_size == len(theirs) == len(saved)
    assert ours.eos_token_id == theirs.eos_token_id == saved.eos_token_id
    for text in (
        f"the th e{END_OF_TEXT} the <pad> <user><bot>  <end> a<end>",
        "",
        " the",
        f"{END_OF_TEXT}the{END_OF_TEXT}",
    ):
        assert ours.encode(text) == theirs.encode(text) == saved.encode(text)


def test_layouts_of_the_same_tokenizer_have_one_fingerprint(data_dir, tmp_path):
    openai = Tokenizer.from_pretrained(data_dir / "gpt2")
    assert (openai.vocab_size, openai.eos_token_id) == (50257, 50256)
    assert openai.encode("Hello world") == [15496, 995]
    openai.save_pretrained(tmp_path / "all")
    prints = {openai.fingerprint()}
    for names in (["tokenizer.json"], ["vocab.json", "merges.txt"]):
        directory = tmp_path / names[0]
        directory.mkdir()
        for name in names:
            shutil.copy(tmp_path / "all" / name, directory)
        prints.add(Tokenizer.from_pretrained(directory).fingerprint())
    assert len(prints) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"merges": ["h e", "t h"]},
        {"vocab": byte_vocab("he", "th")},
        {"add_prefix_space": True},
        {"added_tokens": [AddedToken(END_OF_TEXT, 258, lstrip=True)]},
        {"added_tokens": []},
    ],
    ids=lambda other: next(iter(other)),
)
def test_the_fingerprint_tells_what_changes_ids(other):
    same = {
        "vocab": byte_vocab("th", "he"),
        "merges": ["t h", "h e"],
        "added_tokens": [AddedToken(END_OF_TEXT, 258)],
    }
    assert BPETokenizer(**same).fingerprint() == BPETokenizer(**same).fingerprint()
    assert BPETokenizer(**same).fingerprint() != BPETokenizer(**{**same, **other}).fingerprint()


@pytest.mark.parametrize("with_config", [True, False], ids=["config.json", "no config.json"])
@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_transformers_loads_what_is_saved_without_a_warning(
    kind, with_config, trained, tmp_path, caplog
):
    import transformers

    ours = trained if kind == "bpe" else CharTokenizer.train([TRAINING_TEXT])
    ours.save_pretrained(tmp_path)
    if with_config:
        write(tmp_path, {"config.json": transformers.GPT2Config().to_dict()})
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        if kind == "bpe":
            transformers.GPT2Tokenizer.from_pretrained(tmp_path)
            transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    transformers.logging.disable_propagation()
    assert not caplog.records
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == ours.eos_token_id
    assert theirs.encode(TRAINING_TEXT) == ours.encode(TRAINING_TEXT)
    assert theirs.decode(ours.encode(TRAINING_TEXT)) == TRAINING_TEXT
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(ours)
    assert loaded.fingerprint() == ours.fingerprint()
    assert loaded.eos_token_id == ours.eos_token_id


def test_saving_replaces_another_tokenizer_in_the_directory(trained, tmp_path):
    write(tmp_path, {"special_tokens_map.json": {"eos_token": "<other>"}})
    char = CharTokenizer.train(["abc"])
    for tokenizer in (trained, char, trained):
        tokenizer.save_pretrained(tmp_path)
        loaded = Tokenizer.from_pretrained(tmp_path)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.eos_token_id == tokenizer.eos_token_id


def test_an_end_token_that_is_no_token_is_refused():
    with pytest.raises(TokenizerError, match="'</s>'"):
        BPETokenizer(byte_vocab(), [], special_tokens={"eos_token": "</s>"})


def test_merges_with_windows_line_ends_load(tmp_path):
    files = {**VOCAB_AND_MERGES, "merges.txt": "#version: 0.2\r\nt h\r\nth e\r\n"}
    assert Tokenizer.from_pretrained(write(tmp_path, files)).encode("the") == [257]


# -- what is refused -------------------------------------------------------------------------------

REFUSED = {
    "unigrams in an object": (tokenizer_json(model__type="Unigram"), "tokenizers .* reads"),
    "no model": (tokenizer_json(model=None), "model is"),
    "no vocab": (tokenizer_json(model={"type": "BPE", "merges": []}), "model.vocab is missing"),
    "empty vocab": (tokenizer_json(model__vocab={}), "model.vocab"),
    "vocab as list": (tokenizer_json(model__vocab=["a"]), "model.vocab"),
    "merges as text": (tokenizer_json(model__merges="t h"), "model.merges"),
    "merge of three": (tokenizer_json(model__merges=["t h e"]), "model.merges 0"),
    "merge of numbers": (tokenizer_json(model__merges=[["t", "h"], [1, 2]]), "model.merges 1"),
    "unknown token": (tokenizer_json(model__merges=["t h", "h e"]), "merge 1 .*'he'"),
    "id twice": (tokenizer_json(model__vocab={**byte_vocab("th"), "the": 7}), "same id 7"),
    "id as text": (tokenizer_json(model__vocab={**byte_vocab("th"), "the": "257"}), "'257'"),
    "id as bool": (tokenizer_json(model__vocab={**byte_vocab("th"), "the": True}), "True"),
    "id negative": (tokenizer_json(model__vocab={**byte_vocab("th"), "the": -1}), "-1"),
    "id huge": (tokenizer_json(model__vocab={**byte_vocab("th"), "the": 10**15}), "10{15}"),
    "surrogate": (tokenizer_json(model__vocab={**byte_vocab("th", "the"), "\ud800": 258}), "D800"),
    "steps that nobody knows": (tokenizer_json(normalizer={"type": "NF"}), "reads"),
    "pattern that is none": (
        tokenizer_json(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
        "reads",
    ),
    "added as object": (tokenizer_json(added_tokens={}), "added_tokens"),
    "added as text": (tokenizer_json(added_tokens=["<x>"]), r"added_tokens\[0\]"),
    "added without id": (tokenizer_json(added_tokens=[{"content": "<x>"}]), "id is None"),
    "added empty": (tokenizer_json(added_tokens=[{"id": 258, "content": ""}]), "content is ''"),
    "added with a gap": (tokenizer_json(added_tokens=[{"id": 300, "content": "<x>"}]), "300.*258"),
    "added with two ids": (tokenizer_json(added_tokens=[{"id": 258, "content": "th"}]), "258.*256"),
    "added flag": (
        tokenizer_json(added_tokens=[{"id": 258, "content": "<x>", "lstrip": 1}]),
        "lstrip is 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_tokenizer_json_is_refused_by_field(name, tmp_path):
    content, message = REFUSED[name]
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_pretrained(write(tmp_path, {"tokenizer.json": content}))
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


WORKING = json.dumps(tokenizer_json())
BROKEN = {
    "nothing": ({}, "holds no tokenizer"),
    "cut off": ({"tokenizer.json": WORKING[: len(WORKING) // 2]}, "not valid JSON"),
    "empty": ({"tokenizer.json": b""}, "not valid JSON"),
    "list": ({"tokenizer.json": []}, "expected a JSON object"),
    "deep": ({"tokenizer.json": "[" * 100_000}, "nested more than 100 deep"),
    "latin-1": ({"tokenizer.json": '{"model": "é"}'.encode("latin-1")}, "not UTF-8.*0xE9"),
    "long number": ({"tokenizer.json": '{"v": ' + "1" * 10_000 + "}"}, "a number of 10000 digits"),
    "name twice": ({"tokenizer.json": '{"a": 1, "a": 2}'}, "'a' is there twice"),
    "merge line": ({**VOCAB_AND_MERGES, "merges.txt": "t h\nthe\n"}, "merge 1 is 'the'"),
    "foreign merges": ({**VOCAB_AND_MERGES, "merges.txt": "c t\n"}, "'ct'"),
    "only vocab": ({"vocab.json": byte_vocab("th")}, "needs its merges.txt"),
    "char ids": ({"vocab.json": {"a": 0, "b": 2}}, "0 to 1"),
    "char without vocab": ({"tokenizer_config.json": {"gpt2fast_kind": "char"}}, "vocab.json"),
    "config": ({**VOCAB_AND_MERGES, "tokenizer_config.json": "{"}, "tokenizer_config.json"),
    "eos": ({**VOCAB_AND_MERGES, "tokenizer_config.json": {"eos_token": 5}}, "eos_token is 5"),
    "extra": (
        {**VOCAB_AND_MERGES, "tokenizer_config.json": {"extra_special_tokens": "<x>"}},
        "extra_special_tokens is '<x>'",
    ),
    "bos": (
        {**VOCAB_AND_MERGES, "tokenizer_config.json": {"add_bos_token": "yes"}},
        "add_bos_token",
    ),
    "added": ({**VOCAB_AND_MERGES, "added_tokens.json": {"<x>": None}}, "added_tokens.json"),
    "decoder": (
        {**VOCAB_AND_MERGES, "tokenizer_config.json": {"added_tokens_decoder": {"x": {}}}},
        "added_tokens_decoder.x",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_give_one_clear_error(name, tmp_path):
    files, message = BROKEN[name]
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.from_pretrained(write(tmp_path, files))
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) * 2 + 400


def test_a_file_of_absurd_size_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(1 << 36)
    with pytest.raises(TokenizerError, match="68719476736 bytes"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_damaged_files_load_or_give_a_tokenizer_error(kind, tmp_path):
    rng = random.Random(kind)
    tokenizer = (
        BPETokenizer.train(["the cat, the cat"] * 2, 262)
        if kind == "bpe"
        else CharTokenizer.train(["the cat<|endoftext|>"])
    )
    tokenizer.save_pretrained(tmp_path / "whole")
    refused = 0
    for trial in range(150):
        directory = tmp_path / str(trial)
        shutil.copytree(tmp_path / "whole", directory)
        if kind == "bpe" and trial % 2:
            (directory / "tokenizer.json").unlink()
        used = "vocab.json" if kind == "char" or trial % 2 else "tokenizer.json"
        path = directory / rng.choice([used, "tokenizer_config.json"])
        data = bytearray(path.read_bytes())
        if trial % 3:
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            loaded = Tokenizer.from_pretrained(directory)
        except TokenizerError as error:
            refused += 1
            assert str(directory) in str(error)
        else:
            if isinstance(loaded, BPETokenizer):
                assert "".join(map(loaded.decoder().push, loaded.encode("cat"))) != ""
    assert refused > 75
