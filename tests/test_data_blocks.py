"""Text read in blocks has the tokens of the whole text."""

# ruff: noqa: F401, F811 (imported fixtures)

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2fast.data import prepare_data
from gpt2fast.data.opening import TextInput
from gpt2fast.data.preparation import cuts_for
from gpt2fast.data.text import END_OF_TEXT, Cuts, read_blocks
from gpt2fast.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from small_library import (
    PIECES,
    STORY,
    bpe,
    bpe_dir,
    plain,
    tokens_of,
    write,
)

# -- reading in blocks ---------------------------------------------------------------------------

TEXTS = st.lists(PIECES, max_size=60).map("".join)


def encode_in_blocks(path: Path, tokenizer: Tokenizer, block_size: int) -> list[int | None]:
    ids: list[int | None] = []
    for segments, _ in read_blocks(
        TextInput(path), cuts_for(tokenizer)._replace(block_size=block_size)
    ):
        for text, separator, _ in segments:
            ids += tokenizer.encode(text) + [tokenizer.eos_token_id] * separator
    return ids


@pytest.mark.parametrize("kind", ["bpe", "prefix_space", "spaced_special", "char"])
@given(text=TEXTS, block_size=st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_blocks_give_the_tokens_of_the_whole_text(
    kind, text, block_size, bpe_dir, tmp_path_factory
):
    tokenizer = _tokenizer(kind, bpe_dir, tmp_path_factory)
    path = write(tmp_path_factory.getbasetemp() / f"blocks-{kind}.txt", text)
    assert encode_in_blocks(path, tokenizer, block_size) == tokenizer.encode(plain(text))


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


@given(text=TEXTS, block_size=st.integers(1, 50), any_character=st.booleans())
@settings(max_examples=150, deadline=None)
def test_reading_can_start_again_after_any_block(text, block_size, any_character, tmp_path_factory):
    path = write(tmp_path_factory.getbasetemp() / "again.txt", text)
    cuts = Cuts(any_character, block_size=block_size)
    blocks = list(read_blocks(TextInput(path), cuts))
    for number, (_, end) in enumerate(blocks):
        rest = read_blocks(TextInput(path), cuts, end)
        assert joined(rest) == joined(blocks[number + 1 :])


@pytest.mark.parametrize(
    "text",
    ["...", ".,;:", "a.!", "12.5", "it's,", "\x1c!", "!\x1c ", "ll'll", "的。的", "½.", "a  \n b"],
)
def test_no_block_ends_within_a_word_of_the_tokenizer(tmp_path, text):
    text = text * 40
    tokenizer = BPETokenizer.train([text], 300)
    path = write(tmp_path / "text.txt", text)
    for block_size in range(1, 40):
        assert encode_in_blocks(path, tokenizer, block_size) == tokenizer.encode(text)


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
    blocks = list(read_blocks(TextInput(path), Cuts(any_character, block_size=8192)))
    assert "".join(segments[0].text for segments, _ in blocks) == text
    assert max(len(segments[0].text.encode()) for segments, _ in blocks) <= 3 * 8192


@pytest.mark.parametrize("letter", ["a", " ", "\n", "é", "1", "!"])
def test_a_text_of_one_letter_works(tmp_path, bpe_dir, letter):
    path = write(tmp_path / "letters.txt", letter * 300_000)
    data = prepare_data(path, tmp_path / "out", tokenizer=str(bpe_dir))
    tokenizer = Tokenizer.from_pretrained(bpe_dir)
    assert tokens_of(data.directory, "train") == tokenizer.encode(letter * 270_000)
    assert data.meta.val_characters == 30_000
