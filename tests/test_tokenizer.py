"""Tokenizers give transformers' ids and text for the same files, and refuse what they cannot."""

# ruff: noqa: F401, F811 (imported fixtures)

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2fast.errors import TokenizerError
from gpt2fast.tokenizer import (
    END_OF_TEXT,
    AddedToken,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
)
from gpt2fast.tokenizer.merges import BYTE_TO_CHAR
from gpt2fast.tokenizer.streams import PIECE, short_words
from small_tokenizers import TRAINING_TEXT, trained


@pytest.fixture(scope="module", params=["trained", "gpt2"])
def pair(request, trained, tmp_path_factory):
    """One of our tokenizers and transformers' of the same files."""
    from transformers import GPT2TokenizerFast

    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "trained":
        trained.save_pretrained(directory)
    else:
        source = request.getfixturevalue("data_dir") / "gpt2"
        shutil.copy(source / "encoder.json", directory / "vocab.json")
        shutil.copy(source / "vocab.bpe", directory / "merges.txt")
    return Tokenizer.from_pretrained(directory), GPT2TokenizerFast.from_pretrained(directory)


# -- the same as transformers ----------------------------------------------------------------------

ADVERSARIAL = {
    "empty": "",
    "space": " ",
    "emoji": "🤗👩‍👩‍👧‍👦 🏳️‍🌈👍🏽🇩🇪 ❤️‍🔥",
    "combining": "e\u0301 a\u0300\u0301\u0302 Z\u0351\u036b\u0343 \u0301start नि กำ",
    "cyrillic": "Съешь ещё этих мягких французских булок, да выпей чаю",
    "cjk": "敏捷的棕色狐狸跳过了懒狗。すばやい茶色の狐、 한국어 텍스트 𠀀𪛖",
    "spaces": "a  b   c    d     e" + " " * 50 + "f ",
    "newlines": "\n\n\na\n \n b\r\n\r\n  c\n\n",
    "tabs": "\ta\t\tb \t c\t \td\t",
    "unicode spaces": "a\u00a0b\u2003 \u3000c\u2028d\u2029e\u1680\u205f\u200a f\x85g\u202f",
    "not white space": "a\u200bb\ufeffc\u180ed\u2060e\x1cf\x1d\x1e \x1fg",
    "controls": "\x00\x01a\x00\x00b\x7f\x80\x9f\x0b\x0c ",
    "contractions": "I'm he's we're they've you'll I'd can't 'sS ''s 'RE it'S 's't",
    "digits": "1234567890 1 22  333 3.14159 ٣٤٥ Ⅻ ½²³ १२ 1a2b",
    "punctuation": "!!! ... --- ?!?! (a) [b] {c} <d> _e_ $5.00 #f @g %h a,b ,c , d",
    "end of text": f"{END_OF_TEXT}",
    "ends of text": f"{END_OF_TEXT}{END_OF_TEXT} {END_OF_TEXT}\n{END_OF_TEXT}  a  {END_OF_TEXT}b",
    "half an end": "<|endoftext| endoftext|> <|<|endoftext|>|> <|endoftext|>>",
    "byte spellings": "Ġa Ċ ĠĠ âĢĻ Ã©",
    "mixed": "a1é!\u0301 2二 Ж\u200d🤗'll\u00a0\u00a0x",
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_ids_and_text_equal_those_of_transformers(pair, name):
    ours, theirs = pair
    ids = ours.encode(ADVERSARIAL[name])
    assert ids == theirs.encode(ADVERSARIAL[name])
    assert ours.decode(ids) == ADVERSARIAL[name] == theirs.decode(ids)


TEXT = st.lists(
    st.sampled_from(
        [
            *(
                "a b S 1 9 ! ' ''s 'll 't é e\u0301 Ж 二 🤗 \u200d \u0301 \u00a0 \u2003 \x00 \x1c "
                f"<| |> {END_OF_TEXT} the times wasn"
            ).split(" "),
            *(" ", " ", "  ", "\n", "\t", "\r\n"),
        ]
    )
    | st.text(max_size=4),
    max_size=30,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=TEXT)
def test_any_text_has_the_ids_of_transformers(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == text


def test_characters_of_every_category_are_split_as_by_transformers(pair):
    ours, theirs = pair
    edges = [
        chr(code)
        for code in range(1, 0x110000)
        if not 0xD800 <= code <= 0xE000
        and unicodedata.category(chr(code)) != unicodedata.category(chr(code - 1))
    ]
    text = "".join(f"a{c}1{c}!{c} {c}\n" for edge in edges for c in (edge,))
    assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        " " * 1_000_000 + "x",
        "x" + "\n" * 9_000 + " " * 9_000,
        ("b " + " \u3000" * 6_000) * 3 + "\n",
        "é" * 100_000,
    ],
    ids=["letter", "spaces", "two runs", "three runs", "two bytes"],
)
def test_long_runs_have_the_ids_of_transformers(pair, text):
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_ids_decode_as_in_transformers_and_stream_the_same_text(pair, data):
    ours, theirs = pair
    ids = data.draw(
        st.lists(st.integers(0, 300) | st.integers(0, ours.vocab_size - 1), max_size=40)
    )
    text = ours.decode(ids)
    assert text == theirs.decode(ids, clean_up_tokenization_spaces=False)
    decoder = ours.decoder()
    pieces = [decoder.push(id) for id in ids]
    assert "".join(pieces) + decoder.flush() == text


def test_a_stream_holds_back_half_a_character(trained):
    ids = trained.encode("🦊!")
    assert len(ids) > 2
    decoder = trained.decoder()
    pieces = [decoder.push(id) for id in ids]
    assert [piece for piece in pieces if piece] == ["🦊", "!"]
    assert decoder.flush() == ""
    decoder.push(ids[0])
    assert decoder.flush() == "\ufffd"
    assert decoder.push(trained.encode("a")[0]) == "a"


def random_tokenizer(rng: random.Random, directory: Path):
    """An HF tokenizer with random merges, ids and added tokens, saved to a directory."""
    from tokenizers import AddedToken as HFAddedToken
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = rng.choice(["ab", "abc", "aé "])
    tokens = list(dict.fromkeys(BYTE_TO_CHAR[byte] for byte in alphabet.encode()))
    merges = []
    for _ in range(rng.randrange(25)):
        merge = rng.choice(tokens), rng.choice(tokens)
        if len("".join(merge)) <= 8 and merge not in merges:
            merges.append(merge)
            tokens = list(dict.fromkeys([*tokens, "".join(merge)]))
    vocab = list(dict.fromkeys([*BYTE_TO_CHAR.values(), *tokens]))
    if rng.random() < 0.5:
        rng.shuffle(vocab)
    tokenizer = HFTokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=rng.random() < 0.3)
    tokenizer.decoder = decoders.ByteLevel()
    contents = [END_OF_TEXT, "<x>", "ab", "abc", "a", " a", "a ", "é", "Ġ", "<|", "|>", "b b", "A"]
    for content in rng.sample(contents, rng.randrange(6)):
        flags = {
            name: rng.random() < 0.4
            for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        }
        token = HFAddedToken(content, **flags)
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
    tokenizer.save(str(directory / "tokenizer.json"))
    characters = [*alphabet * 3, *" \n,1A", END_OF_TEXT, "<x>", "ab", "é", "Ġ", "<|"]
    texts = ["".join(rng.choices(characters, k=rng.randrange(14))) for _ in range(60)]
    return tokenizer, texts


@pytest.mark.parametrize("seed", range(80))
def test_random_vocabularies_give_the_ids_of_hf_tokenizers(seed, tmp_path):
    """Merges that never happen, tokens made in two ways, ids in any order, all added tokens."""
    rng = random.Random(seed)
    theirs, texts = random_tokenizer(rng, tmp_path)
    try:
        ours = Tokenizer.from_pretrained(tmp_path)
    except TokenizerError as error:
        # possible where two merges make the same token
        assert "which only merge" in str(error)
        return
    assert ours.vocab_size == theirs.get_vocab_size(with_added_tokens=True)
    for text in texts:
        assert ours.encode(text) == theirs.encode(text).ids, text
    for _ in range(30):
        ids = rng.choices(range(ours.vocab_size), k=rng.randrange(12))
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    ours.save_pretrained(tmp_path / "saved")
    assert Tokenizer.from_pretrained(tmp_path / "saved").fingerprint() == ours.fingerprint()


def test_most_random_vocabularies_are_supported(tmp_path):
    refused = 0
    for seed in range(80):
        random_tokenizer(random.Random(seed), tmp_path)
        try:
            Tokenizer.from_pretrained(tmp_path)
        except TokenizerError:
            refused += 1
    assert refused < 16


@pytest.mark.parametrize("id", [-1, 360, 10**30, "x", None, 1.5])
def test_an_id_out_of_range_is_named_with_the_limit(trained, id):
    assert trained.vocab_size == 360
    for use in (lambda: trained.decode([1, id]), lambda: trained.decoder().push(id)):
        with pytest.raises(TokenizerError, match=f"{id!r}.*360 tokens with ids from 0 to 359"):
            use()


def test_tensors_of_ids_decode(trained):
    import torch

    ids = trained.encode("the best")
    assert trained.decode(torch.tensor(ids)) == "the best"
    assert trained.decode(iter(torch.tensor(ids))) == "the best"
    assert "".join(map(trained.decoder().push, torch.tensor(ids))) == "the best"


@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
def test_a_lone_surrogate_is_refused_with_its_position(trained, tokenizer):
    tokenizer = trained if tokenizer == "bpe" else CharTokenizer.train(["ab"])
    with pytest.raises(TokenizerError, match=r"U\+D83E at position 2"):
        tokenizer.encode("ab\ud83e")
    with pytest.raises(TokenizerError, match="a byte that is not UTF-8"):
        tokenizer.encode(os.fsdecode(b"ab\xff"))
    with pytest.raises(TokenizerError, match="bytes"):
        tokenizer.encode(b"ab")


# -- training --------------------------------------------------------------------------------------


def test_training_is_the_same_however_the_text_is_chunked():
    whole = BPETokenizer.train([TRAINING_TEXT], 360)
    for size in (1, 7, 100):
        chunks = (TRAINING_TEXT[i : i + size] for i in range(0, len(TRAINING_TEXT), size))
        assert BPETokenizer.train(chunks, 360).fingerprint() == whole.fingerprint()
    characters = CharTokenizer.train([TRAINING_TEXT])
    assert CharTokenizer.train(TRAINING_TEXT).fingerprint() == characters.fingerprint()


def test_a_trained_bpe_has_the_merges_of_hf_tokenizers(trained):
    from tokenizers import ByteLevelBPETokenizer

    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator(TRAINING_TEXT.split(END_OF_TEXT), 359, 2, show_progress=False)
    assert trained._merges == [
        " ".join(merge) for merge in json.loads(theirs._tokenizer.to_str())["model"]["merges"]
    ]


def test_end_of_text_is_the_last_id_and_part_of_no_other_token(trained):
    assert trained.eos_token_id == trained.vocab_size - 1 == 359
    assert trained.encode(f"a{END_OF_TEXT}")[-1] == 359
    assert not any("<|" in trained.decode([id]) for id in range(359))
    text = f"the times{END_OF_TEXT}\n"
    assert trained.decode(trained.encode(text)) == text


def test_a_small_text_gives_a_smaller_vocabulary():
    tokenizer = BPETokenizer.train(["abab"], 5000)
    assert tokenizer.vocab_size == 256 + 1 + 1
    assert tokenizer.eos_token_id == 257
    assert BPETokenizer.train([], 257).encode("a") == [BPETokenizer.train([], 300).encode("a")[0]]


@pytest.mark.parametrize("vocab_size", [256, 0, -5, 2**25, "many", None])
def test_an_impossible_vocabulary_size_is_refused(vocab_size):
    with pytest.raises(TokenizerError, match=f"vocab_size={vocab_size!r}"):
        BPETokenizer.train(["text"], vocab_size)


# -- characters ------------------------------------------------------------------------------------


def test_tiny_shakespeare_has_65_characters(data_dir):
    text = (data_dir / "tinyshakespeare.txt").read_text()
    tokenizer = CharTokenizer.train([text])
    assert tokenizer.vocab_size == 65
    assert tokenizer.eos_token_id is None
    ids = tokenizer.encode(text)
    assert ids[:5] == [18, 47, 56, 57, 58]  # nanoGPT's
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("cut", range(1, len(END_OF_TEXT)))
def test_end_of_text_stands_outside_the_characters(cut):
    tokenizer = CharTokenizer.train(["ba" + END_OF_TEXT[:cut], END_OF_TEXT[cut:] + "c"])
    assert tokenizer.vocab_size == 4
    assert tokenizer.eos_token_id == 3
    assert tokenizer.encode(f"abc{END_OF_TEXT}{END_OF_TEXT}a") == [0, 1, 2, 3, 3, 0]
    assert tokenizer.decode([0, 3, 1]) == f"a{END_OF_TEXT}b"


def test_an_unknown_character_is_named():
    tokenizer = CharTokenizer.train(["abc"])
    with pytest.raises(TokenizerError, match=r"'é' \(U\+00E9, position 3\)"):
        tokenizer.encode("abcé")
    with pytest.raises(TokenizerError, match="no character"):
        CharTokenizer.train([""])


def test_a_character_vocabulary_is_readable_and_survives_saving(tmp_path):
    text = 'é\n\t "\\🤗\u2028\x00二'
    tokenizer = CharTokenizer.train([text])
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text())["🤗"] == tokenizer.encode("🤗")[0]
    assert "🤗" in (tmp_path / "vocab.json").read_text()
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.decode(loaded.encode(text)) == text
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path).fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize("vocab_size", [300, 700])
def test_training_on_ordinary_text_finds_the_merges_of_the_tokenizers_library(vocab_size):
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    # Words of just the longest length that is looked at whole are among them.
    text = TRAINING_TEXT.replace(END_OF_TEXT, " ") + 3 * (" " + "ab" * 256 + " " + "=" * 512 + "\n")
    theirs = HFTokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(BYTE_TO_CHAR.values()),
    )
    theirs.train_from_iterator([text], trainer)
    ours = BPETokenizer.train([text], vocab_size)
    vocab = theirs.get_vocab()
    assert (
        ours.fingerprint()
        == BPETokenizer(
            vocab | {END_OF_TEXT: len(vocab)},
            [" ".join(merge) for merge in json.loads(theirs.to_str())["model"]["merges"]],
            [AddedToken(END_OF_TEXT, id=len(vocab))],
        ).fingerprint()
    )


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "字", "7", "?", " ", "\n", "a?", "a b ", "é1 "]),
                  st.sampled_from([1, 2, 255, 256, 257, 511, 512, 513, 1024, 1500])),
        max_size=6,
    )
)  # fmt: skip
def test_training_sees_no_long_word_and_all_of_the_text(runs):
    from tokenizers import pre_tokenizers

    text = "".join(part * (count // len(part)) for part, count in runs)
    pieces = list(short_words([text]))
    assert "".join(pieces) == text
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    if text:
        found = [end - begin for piece in pieces for _, (begin, end) in words(piece)]
        assert max(found) <= PIECE + 1  # and a space before it
        if max(end - begin for _, (begin, end) in words(text)) < PIECE:
            assert pieces == [text]


# nanoGPT's meta.pkl


def nanogpt_meta(path: Path, text: str, protocol: int = 4, **changes: object) -> dict[str, int]:
    """Write meta.pkl like nanoGPT's data/shakespeare_char/prepare.py."""
    characters = sorted(set(text))
    ids = {character: id for id, character in enumerate(characters)}
    meta = {"vocab_size": len(ids), "itos": dict(enumerate(characters)), "stoi": ids}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(meta | changes, protocol=protocol))
    return ids


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nanogpts_characters(tmp_path, protocol):
    text = "".join(map(chr, range(32, 24_000)))  # more than any book has
    ids = nanogpt_meta(tmp_path / "meta.pkl", text, protocol)
    for place in (tmp_path, tmp_path / "meta.pkl"):
        tokenizer = Tokenizer.from_pretrained(place)
        assert isinstance(tokenizer, CharTokenizer)
        assert tokenizer.encode("Wörter, 字") == [ids[character] for character in "Wörter, 字"]
        assert tokenizer.decode(tokenizer.encode("ab\u0416")) == "ab\u0416"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert Tokenizer.from_pretrained(tmp_path / "saved").fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize("where", ["beside", "repository", "current"])
def test_nanogpts_characters_are_found_by_the_checkpoint(tmp_path, monkeypatch, where):
    torch = pytest.importorskip("torch")
    out = tmp_path / "nanoGPT" / "out-shakespeare-char"
    out.mkdir(parents=True)
    torch.save({"model": {}, "config": {"dataset": "shakespeare_char"}}, out / "ckpt.pt")
    with pytest.raises(TokenizerError, match=r"data/shakespeare_char/meta\.pkl"):
        Tokenizer.from_pretrained(out)
    folder = {
        "beside": out,
        "repository": tmp_path / "nanoGPT" / "data" / "shakespeare_char",
        "current": tmp_path / "here" / "data" / "shakespeare_char",
    }[where]
    nanogpt_meta(folder / "meta.pkl", "abc")
    monkeypatch.chdir(tmp_path / "here" if where == "current" else tmp_path)
    for place in (out, out / "ckpt.pt"):
        assert Tokenizer.from_pretrained(place).encode("cab") == [2, 0, 1]


@pytest.mark.parametrize("name", ["../../secret", "/etc", "a/b", "..", "", 3, None, "x" * 200])
def test_a_checkpoint_cannot_point_out_of_the_data(tmp_path, monkeypatch, name):
    torch = pytest.importorskip("torch")
    out = tmp_path / "a" / "out"
    out.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    torch.save({"model": {}, "config": {"dataset": name}}, out / "ckpt.pt")
    nanogpt_meta(tmp_path / "secret" / "meta.pkl", "abc")
    nanogpt_meta(tmp_path / "a" / "data" / "a" / "b" / "meta.pkl", "abc")
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        Tokenizer.from_pretrained(out)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stoi": {"ab": 0}, "itos": {0: "ab"}, "vocab_size": 1}, "not a single character"),
        ({"stoi": {"a": 0, "b": 2}, "itos": {0: "a", 2: "b"}, "vocab_size": 2}, "must be 0 to 1"),
        ({"itos": {0: "b", 1: "a", 2: "c"}}, "contradict"),
        ({"itos": {0: "a"}}, "contradict"),
        ({"vocab_size": 50304}, "vocab_size is 50304, but there are 3"),
        ({"stoi": None}, "names no characters"),
        ({"stoi": {}}, "names no characters"),
        ({"stoi": {"a": "b"}}, "not an id"),
        ({"stoi": {1: 2}}, "not an id"),
        ({"stoi": print}, "could run code"),
        ({"extra": [b"x" * 100] * 3}, "not opened"),
    ],
)
def test_a_meta_that_holds_something_else_is_refused(tmp_path, changes, reason):
    nanogpt_meta(tmp_path / "meta.pkl", "abc", **changes)
    with pytest.raises(TokenizerError, match=rf"meta\.pkl.*{reason}"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80", pickle.dumps([1]), b"x" * 50, b"." * (9 << 20)])
def test_a_damaged_meta_is_one_error(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"meta\.pkl"):
        Tokenizer.from_pretrained(tmp_path)
