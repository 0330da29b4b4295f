"""Tokenizers of every kind that `tokenizers` has: the ids and texts of transformers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from gpt2fast import GPT2, Generator, GPT2Config
from gpt2fast.data.prepare import prepare_data
from gpt2fast.errors import TokenizerError
from gpt2fast.tokenizer import BPETokenizer, LibraryTokenizer, Tokenizer
from small_library import set_pace

TEXT = (
    "It was the best of times, it was the worst of times; I'd say it's 1859,\n"
    "wasn't it? We've  seen\tthe   age of wisdom, and they'll see it again in 2024.\n\n"
    "Ünïcödé, Привет, 你好, naïve café, ﬁne ２３ Ⅳ, éàü, don't they're .\n"
) * 6
ALPHABET = (
    "abcdefghij  \n\t..,'!?0123456789ABCDEÜéñß"
    "\u0301\u0327ﬁⅣ２あ你好한🤗👍🏽\u200d\u00a0\u3000\x00\ufffd"
)


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = [
        *ALPHABET,
        *TEXT.split(),
        " the",
        "<|endoftext|>",
        "<pad>",
        "<|im_start|>",
        " n't",
        "  ",
    ]
    texts = ["".join(rng.choices(words, k=rng.randrange(40))) for _ in range(count)]
    texts += [
        "".join(
            chr(rng.choice([rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x20000)]))
            for _ in range(8)
        )
        for _ in range(count)
    ]
    return ["", " ", "a", *texts]


def byte_bpe(
    vocab_size: int = 320, alphabet: bool = True, add_prefix_space: bool = False, **options: Any
) -> tokenizers.Tokenizer:
    """A byte-level BPE as the tutorials train it."""
    trained = tokenizers.Tokenizer(models.BPE(**options))
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<pad>", "<unk>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
    )
    trained.train_from_iterator([TEXT], trainer)
    return trained


def changed(**steps: object) -> Callable[[], tokenizers.Tokenizer]:
    def make() -> tokenizers.Tokenizer:
        made = byte_bpe()
        for name, step in steps.items():
            setattr(made, name, step)
        return made

    return make


def with_model(**changes: object) -> Callable[[], tokenizers.Tokenizer]:
    def make() -> tokenizers.Tokenizer:
        content = json.loads(byte_bpe().to_str())
        content["model"].update(changes)
        return tokenizers.Tokenizer.from_str(json.dumps(content))

    return make


def with_added(**flags: bool) -> Callable[[], tokenizers.Tokenizer]:
    def make() -> tokenizers.Tokenizer:
        made = byte_bpe()
        for content in ("<|im_start|>", "the", "age of"):
            made.add_tokens([tokenizers.AddedToken(content, **flags)])
        return made

    return make


def template(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=single, special_tokens=[("<|endoftext|>", 0), ("<pad>", 1)]
    )


def byte_level(**options: Any) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def word_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    return made


def word_pieces() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made


def unigrams() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def byte_fallback() -> tokenizers.Tokenizer:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {token: 256 + i for i, token in enumerate(["▁", "a", "t", "h", "th", "▁a"])}
    made = tokenizers.Tokenizer(
        models.BPE(vocab, [("t", "h"), ("▁", "a")], byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return made


def characters_with_suffix() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def Sequence(kind: object, *steps: object) -> object:
    return kind.Sequence(list(steps))  # type: ignore[attr-defined]


# True: still on tiktoken.
KINDS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], bool]] = {
    "plain": (byte_bpe, True),
    "empty template": (changed(post_processor=template("$A")), True),
    "bos": (changed(post_processor=template("<|endoftext|> $A")), True),
    "bos and eos": (changed(post_processor=template("<|endoftext|> $A <pad> <pad>")), True),
    "sequences of one": (
        changed(
            normalizer=Sequence(normalizers),
            pre_tokenizer=Sequence(pre_tokenizers, byte_level()),
            post_processor=Sequence(processors, processors.ByteLevel()),
            decoder=Sequence(decoders, decoders.ByteLevel()),
        ),
        True,
    ),
    "offsets, then eos": (
        changed(post_processor=Sequence(processors, processors.ByteLevel(), template("$A <pad>"))),
        True,
    ),
    "two templates": (
        changed(post_processor=Sequence(processors, template("$A <pad>"), template("<pad> $A"))),
        False,
    ),
    "roberta": (
        changed(post_processor=processors.RobertaProcessing(("<pad>", 1), ("<|endoftext|>", 0))),
        False,
    ),
    "text twice": (changed(post_processor=template("$A <pad> $A")), False),
    "NFC": (changed(normalizer=normalizers.NFC()), False),
    "NFKC": (changed(normalizer=normalizers.NFKC()), False),
    "lowercase": (changed(normalizer=normalizers.Lowercase()), False),
    "accents": (
        changed(
            normalizer=Sequence(
                normalizers, normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()
            )
        ),
        False,
    ),
    "one normalizer in a sequence": (
        changed(normalizer=Sequence(normalizers, normalizers.NFD())),
        False,
    ),
    "strip": (changed(normalizer=normalizers.Strip()), False),
    "digits": (
        changed(
            pre_tokenizer=Sequence(
                pre_tokenizers, pre_tokenizers.Digits(individual_digits=True), byte_level()
            )
        ),
        False,
    ),
    "split": (
        changed(
            pre_tokenizer=Sequence(
                pre_tokenizers,
                pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\p{N}{1,3}|\s+"), "isolated"),
                byte_level(use_regex=False),
            )
        ),
        False,
    ),
    "no pattern": (changed(pre_tokenizer=byte_level(use_regex=False)), False),
    "white space": (
        changed(pre_tokenizer=Sequence(pre_tokenizers, pre_tokenizers.Whitespace(), byte_level())),
        False,
    ),
    "prefix space": (lambda: byte_bpe(add_prefix_space=True), True),
    "missing bytes": (lambda: byte_bpe(alphabet=False), False),
    "missing bytes, unknown": (lambda: byte_bpe(alphabet=False, unk_token="<unk>"), False),
    "missing bytes, unknown fused": (
        lambda: byte_bpe(alphabet=False, unk_token="<unk>", fuse_unk=True),
        False,
    ),
    "ignore merges": (with_model(ignore_merges=True), False),
    "dropout of all merges": (with_model(dropout=1.0), False),
    "dropout of none": (with_model(dropout=0.0), True),
    "byte fallback": (byte_fallback, False),
    "suffix": (characters_with_suffix, False),
    "added": (with_added(), True),
    "added, lstrip": (with_added(lstrip=True), True),
    "added, rstrip": (with_added(rstrip=True), True),
    "added, single word": (with_added(single_word=True), True),
    "added, not normalized": (with_added(normalized=False), True),
    "added, before a normalizer": (
        lambda: _lower(with_added(normalized=True, lstrip=True)()),
        False,
    ),
    "no decoder": (changed(decoder=None), False),
    "words": (word_level, False),
    "word pieces": (word_pieces, False),
    "unigrams": (unigrams, False),
}  # fmt: skip


def _lower(made: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    made.normalizer = normalizers.Lowercase()
    return made


def assert_same(ours: Tokenizer, theirs, seed: int = 0, count: int = 60) -> None:
    for text in random_texts(count, seed):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        bare = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == bare, text
        assert_decodes_alike(ours, theirs, ids)
    rng = random.Random(seed)
    known = sorted(theirs.get_vocab().values())
    for _ in range(count):
        assert_decodes_alike(ours, theirs, rng.choices(known, k=rng.randrange(1, 60)))


def assert_decodes_alike(ours: Tokenizer, theirs, ids: list[int]) -> None:
    text = theirs.decode(ids)
    assert ours.decode(ids) == text
    stream = ours.decoder()
    assert "".join([*map(stream.push, ids), stream.flush()]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_has_the_ids_and_text_of_transformers(kind, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    make, fast = KINDS[kind]
    named = {"eos_token": "<|endoftext|>"} if make().token_to_id("<|endoftext|>") == 0 else {}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=make(), **named)
    wrapped.save_pretrained(tmp_path / "theirs")
    ours = Tokenizer.from_pretrained(tmp_path / "theirs")
    assert type(ours) is (BPETokenizer if fast else LibraryTokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert_same(ours, theirs)
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    # An object is the same tokenizer as its files, and so is what is saved here.
    assert_same(Tokenizer.of(wrapped), theirs, seed=1, count=20)
    assert Tokenizer.of(wrapped).fingerprint() == ours.fingerprint()
    ours.save_pretrained(tmp_path / "ours")
    again = Tokenizer.from_pretrained(tmp_path / "ours")
    assert again.fingerprint() == ours.fingerprint()
    assert again.eos_token_id == ours.eos_token_id
    assert_same(ours, AutoTokenizer.from_pretrained(tmp_path / "ours"), seed=2, count=20)


GPT2_OPTIONS = {
    "plain": {},
    "bos": {"add_bos_token": True},
    "eos": {"add_eos_token": True},
    "both": {"add_bos_token": True, "add_eos_token": True, "bos_token": "<s>"},
    "prefix space": {"add_prefix_space": True},
    "pad": {"pad_token": "<pad>", "unk_token": "<unk>"},
    "extra": {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]},
}


@pytest.mark.parametrize("alphabet", [True, False])
@pytest.mark.parametrize("options", GPT2_OPTIONS)
def test_what_transformers_builds_of_vocab_and_merges_and_saves_loads(options, alphabet, tmp_path):
    from transformers import AutoTokenizer, GPT2Tokenizer

    byte_bpe(alphabet=alphabet).model.save(str(tmp_path))
    built = GPT2Tokenizer(
        vocab=str(tmp_path / "vocab.json"),
        merges=str(tmp_path / "merges.txt"),
        **GPT2_OPTIONS[options],
    )
    built.save_pretrained(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    ours = Tokenizer.from_pretrained(tmp_path / "saved")
    assert isinstance(ours, BPETokenizer) is alphabet
    assert_same(ours, theirs)
    assert_same(Tokenizer.of(built), built, seed=1)
    # The same from vocab.json and merges.txt, with what tokenizer_config.json says.
    config = {"tokenizer_class": "GPT2Tokenizer", **GPT2_OPTIONS[options]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert_same(
        Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path), seed=2
    )


def test_steps_that_transformers_class_leaves_out_are_left_out_with_a_word(tmp_path, caplog):
    from transformers import AutoTokenizer, GPT2Tokenizer

    lower = _lower(byte_bpe())
    GPT2Tokenizer(tokenizer_object=lower).save_pretrained(tmp_path)
    ours, theirs = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert "PreTrainedTokenizerFast" in caplog.text
    assert_same(ours, theirs)
    assert ours.encode("ABC") != lower.encode("ABC").ids


def test_a_generator_takes_tokenizers_of_transformers():
    from transformers import ByT5Tokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

    content = json.loads(byte_bpe().to_str())["model"]
    merges = [tuple(merge) for merge in content["merges"]]
    ours = BPETokenizer(content["vocab"], [" ".join(merge) for merge in merges])
    bpe = byte_bpe()
    model = GPT2(GPT2Config(vocab_size=400, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    wanted = Generator(model, ours, notify=print)("It was the best", seed=1, max_new_tokens=20)
    for tokenizer in (
        bpe,
        PreTrainedTokenizerFast(tokenizer_object=bpe),
        GPT2Tokenizer(vocab=content["vocab"], merges=merges),
    ):
        found = Generator(model, tokenizer, notify=print)
        generation = found("It was the best", seed=1, max_new_tokens=20, eos_token_id=None)
        assert generation.text == wanted.text
        assert "".join(found.stream("It was the best", seed=1, max_new_tokens=20)) == wanted.text
    slow = ByT5Tokenizer()
    generation = Generator(model, slow, notify=print)("é", seed=1, max_new_tokens=20)
    assert generation.prompt_tokens == len(slow("é").input_ids)
    assert generation.text == slow.decode(generation.tokens)


def test_a_slow_tokenizer_has_its_own_ids_and_text(tmp_path):
    from transformers import ByT5Tokenizer

    theirs = ByT5Tokenizer()
    ours = Tokenizer.of(theirs)
    assert_same(ours, theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer_config.json").is_file()


@pytest.mark.parametrize("thing", [None, "gpt2", {"a": 1}, object()])
def test_what_is_no_tokenizer_is_refused(thing):
    with pytest.raises(TokenizerError, match="is no tokenizer"):
        Tokenizer.of(thing)


@pytest.mark.parametrize("kind", ["bos and eos", "accents", "words"])
def test_prepared_data_are_the_ids_of_the_whole_text_without_special_tokens(
    kind, tmp_path, monkeypatch
):
    tokenizer = KINDS[kind][0]()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = TEXT * 60
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    set_pace(monkeypatch, block_size=1000)
    meta = prepare_data(
        [tmp_path / "text.txt"], out, tokenizer=str(tmp_path), split="position", val_fraction=0.5
    ).meta
    parts = text[: meta.train_characters], text[meta.train_characters :]
    for part, name in zip(parts, ("train.bin", "val.bin"), strict=True):
        wanted = tokenizer.encode(part, add_special_tokens=False).ids
        assert np.fromfile(out / name, np.uint16).tolist() == wanted
