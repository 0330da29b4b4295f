"""Training a checkpoint's model on data whose tokenizer has more tokens than its own."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import transformers

from gpt2fast import GPT2, Generator, GPT2Config, Tokenizer
from gpt2fast._system import output
from gpt2fast.cli.prepare import main as prepare
from gpt2fast.cli.train import main, parse
from gpt2fast.data import DataModule
from gpt2fast.data.prepare import prepare_data
from gpt2fast.errors import ConfigError, DataError, TokenizerError
from gpt2fast.tokenizer import BPETokenizer, CharTokenizer, LibraryTokenizer
from gpt2fast.training import train
from gpt2fast.training.config import TrainConfig
from gpt2fast.training.stopping import Interrupted

TEXT = "the quick brown fox jumps over the lazy dog and runs away, as far as it can. " * 40
CHAT = "".join(f"<|user|>the fox {i}<|assistant|>it jumps {i}<|endoftext|>" for i in range(150))
NEW = ["<|user|>", "<|assistant|>"]
BPE = BPETokenizer.train([TEXT], 290)
OLD = BPE.vocab_size


def words() -> LibraryTokenizer:
    vocab = {word: id for id, word in enumerate(["<unk>", "the", "fox", "jumps", "it"])}
    content: dict[str, Any] = {
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
    }
    return LibraryTokenizer(content)


def save_model(folder, tokenizer=BPE, vocab_size=OLD, tied=True) -> GPT2:
    config = GPT2Config(
        n_layer=1, n_head=2, n_embd=32, vocab_size=vocab_size, n_positions=32,
        bos_token_id=OLD - 1, eos_token_id=OLD - 1, tie_word_embeddings=tied, dropout=0.0,
    )  # fmt: skip
    model = GPT2(config)
    model.save_pretrained(folder, tokenizer)
    return model


@pytest.fixture
def base(tmp_path):
    save_model(tmp_path / "base")
    (tmp_path / "chat.txt").write_text(CHAT)
    return TrainConfig(
        init_from=str(tmp_path / "base"), data=str(tmp_path / "chat.txt"),
        out=str(tmp_path / "run"), add_tokens=NEW, block_size=16, batch_size=4, max_steps=6,
        eval_interval=3, warmup_steps=0, checkpoint_interval=3, device="cpu", lr=1e-2,
    )  # fmt: skip


def changed(config, **changes):
    return dataclasses.replace(config, **changes)


# Tokenizers.


@pytest.mark.parametrize("tokenizer", [BPE, words()], ids=["bpe", "words"])
def test_more_tokens_follow_the_others(tokenizer, tmp_path):
    grown = tokenizer.with_tokens(NEW)
    first = tokenizer.vocab_size
    assert grown.vocab_size == first + 2 and tokenizer.vocab_size == first
    assert grown.encode("<|user|>the fox<|assistant|>") == [
        first, *tokenizer.encode("the fox"), first + 1,
    ]  # fmt: skip
    assert grown.difference(tokenizer) is None
    assert tokenizer.difference(grown) is not None
    assert grown.fingerprint() != tokenizer.fingerprint()
    assert first + 1 in grown and first + 2 not in grown

    grown.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.fingerprint() == grown.fingerprint()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "the <|user|> fox<|assistant|> jumps it"
    assert theirs.encode(text) == again.encode(text) == grown.encode(text)
    assert again.with_tokens(["<|tool|>"]).difference(tokenizer) is None


def test_transformers_adds_the_same_tokens(tmp_path):
    BPE.save_pretrained(tmp_path / "old")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "old")
    theirs.add_special_tokens({"additional_special_tokens": NEW, "pad_token": "<|pad|>"})
    theirs.save_pretrained(tmp_path / "new")
    for tokenizer in (Tokenizer.of(theirs), Tokenizer.from_pretrained(tmp_path / "new")):
        assert tokenizer.vocab_size == OLD + 3
        assert tokenizer.difference(BPE) is None
        assert tokenizer.encode(CHAT) == theirs.encode(CHAT)


def test_characters_are_added_one_by_one():
    tokenizer = CharTokenizer.train(["abc"])
    grown = tokenizer.with_tokens(["é", "<|endoftext|>"])
    assert grown.encode("abécab<|endoftext|>") == [0, 1, 3, 2, 0, 1, 4]
    assert grown.difference(tokenizer) is None
    with pytest.raises(TokenizerError, match="'<|user|>' is not a single character"):
        tokenizer.with_tokens(NEW)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (["<|endoftext|>"], "'<.endoftext.>' is a token of this tokenizer already, with the id"),
        (["Ġthe"], "'Ġthe' is a token of this tokenizer already"),
        ([*NEW, "<|user|>"], "'<.user.>' is given twice"),
        ([""], "'' is no token"),
        ([7], "7 is no token"),
        (["\ud800"], "lone surrogate"),
    ],
)
def test_tokens_that_cannot_be_added_are_named(tokens, says):
    with pytest.raises(TokenizerError, match=says):
        BPE.with_tokens(tokens)


def test_the_difference_between_tokenizers_is_named():
    vocab, merges = dict(BPE._vocab), list(BPE._merges)
    swapped = {**vocab, "a": vocab["b"], "b": vocab["a"]}
    other = BPETokenizer(swapped, merges, BPE.added_tokens, special_tokens=BPE._special_tokens)
    assert "is 'b' in it, and 'a' in the other" in other.difference(BPE)
    fewer = BPETokenizer.train([TEXT], 280)
    assert fewer.difference(BPE) is not None and BPE.difference(fewer) is not None
    assert "is a CharTokenizer, and not a BPETokenizer" in CharTokenizer.train("ab").difference(BPE)
    prefixed = BPETokenizer(
        vocab, merges, BPE.added_tokens, special_tokens=BPE._special_tokens, add_prefix_space=True
    )
    assert "merges, special tokens or steps differ" in prefixed.difference(BPE)


# Preparing.


def test_prepared_data_have_the_new_tokens(tmp_path, capsys):
    BPE.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "chat.txt").write_text(CHAT)
    arguments = [str(tmp_path / "chat.txt"), "--tokenizer", str(tmp_path / "tokenizer")]
    out = tmp_path / "data"
    assert prepare([*arguments, "--add-tokens", *NEW, "--out", str(out)]) == 0
    data = DataModule(out, 8, 2)
    assert data.meta.vocab_size == data.tokenizer.vocab_size == OLD + 2
    assert data.first_from(OLD) in (OLD, OLD + 1) and data.first_from(OLD + 2) is None
    tokens = data.tokenizer.encode(CHAT)
    stored = [*data.corpora[0].train.tokens.slice(0, 40).tolist()]
    assert stored == tokens[:40] and stored[0] == OLD
    data.check_tokenizer(BPE)
    data.check_tokenizer(transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    with pytest.raises(DataError, match="another tokenizer.*it is a BPETokenizer, and not a Char"):
        data.check_tokenizer(CharTokenizer.train(["abc"]))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        prepare(["--add-tokens", "<|user|>", str(tmp_path / "chat.txt")])
    assert stop.value.code == 2 and "was taken for one of --add-tokens" in capsys.readouterr().err


def test_a_tokenizer_that_is_trained_counts_the_new_tokens(tmp_path):
    (tmp_path / "chat.txt").write_text(TEXT + CHAT)
    made = prepare_data(
        tmp_path / "chat.txt", tmp_path / "data", tokenizer="bpe", vocab_size=280, add_tokens=NEW
    )
    assert made.meta.vocab_size == 280
    tokenizer = Tokenizer.from_pretrained(tmp_path / "data")
    assert [token.content for token in tokenizer.added_tokens[-2:]] == NEW


# Training.


@pytest.mark.parametrize("tied", [True, False])
def test_training_grows_the_vocabulary(base, tied, capsys):
    model = save_model(base.init_from, tied=tied)
    with output.shown():
        result = train(base)
    told = capsys.readouterr().out + capsys.readouterr().err
    line = [x for x in told.splitlines() if x.startswith("vocabulary:")]
    assert line == [
        f"vocabulary: grown from {OLD} to {OLD + 2} tokens ('<|user|>', '<|assistant|>'); new "
        "embeddings begin as the mean of the others"
    ]
    trained = GPT2.from_pretrained(base.out)
    assert trained.config.vocab_size == OLD + 2
    mean = model.projection.mean(0)
    assert (trained.projection[OLD:] - mean).abs().min(1).values.gt(0).all()  # they have learned
    assert not torch.equal(trained.projection[OLD], trained.projection[OLD + 1])
    assert result.val_loss < 5

    generator = Generator.from_pretrained(base.out)
    assert generator.tokenizer.difference(BPE) is None
    assert generator("<|user|>the fox", max_new_tokens=5).new_tokens > 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base.out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base.out)
    ids = torch.tensor([tokenizer.encode("<|user|>the fox 3<|assistant|>")])
    assert ids.tolist() == [generator.tokenizer.encode("<|user|>the fox 3<|assistant|>")]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, trained(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_first_loss_is_that_of_a_model_resized_by_hand(base):
    model = GPT2.from_pretrained(base.init_from)
    model.resize_token_embeddings(OLD + 2)
    first = []

    def stop(step, loss):
        first.append(loss)
        raise Interrupted(15, "enough")

    with pytest.raises(Interrupted):
        train(base, on_validation=stop)
    data = DataModule(base.out + "/data", 16, 4)
    total = count = 0
    with torch.no_grad():
        for inputs, targets in data.val_dataloader():
            total += model(inputs, targets=targets).loss.item() * targets.numel()
            count += targets.numel()
    assert first == [pytest.approx(total / count, rel=1e-5)]


def test_a_grown_run_resumes_bit_for_bit(base, tmp_path):
    whole = changed(base, out=str(tmp_path / "whole"), sampling="random")
    train(whole)

    def stop(step, loss):
        if step == 6:
            raise Interrupted(15, "enough")

    with pytest.raises(Interrupted):
        train(base, on_validation=stop)
    assert main(["--resume", base.out]) == 0
    first, second = (GPT2.from_pretrained(path).state_dict() for path in (whole.out, base.out))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_prepared_data_grow_the_vocabulary(base, tmp_path):
    prepare_data(base.data, tmp_path / "data", tokenizer=base.init_from, add_tokens=NEW)
    train(changed(base, data=str(tmp_path / "data"), add_tokens=None, max_steps=1))
    assert GPT2.from_pretrained(base.out).config.vocab_size == OLD + 2
    again = changed(base, data=str(tmp_path / "data"), out=str(tmp_path / "again"), max_steps=1)
    train(again)  # what it was prepared with may be said
    wrong = changed(again, add_tokens=["<|tool|>"], out=str(tmp_path / "wrong"))
    with pytest.raises(ConfigError, match="add_tokens is ..<.tool.>... but .* prepared with"):
        train(wrong)


def test_a_padded_vocabulary_has_room(base, capsys):
    save_model(base.init_from, vocab_size=320)
    with output.shown():
        train(changed(base, max_steps=1))
    assert GPT2.from_pretrained(base.out).config.vocab_size == 320
    assert "begin with rows that the model's 320 tokens have to spare" in capsys.readouterr().out


def test_a_tokenizer_that_grew_beside_the_checkpoint(base):
    """After `tokenizer.add_special_tokens` without `model.resize_token_embeddings`."""
    BPE.with_tokens(NEW).save_pretrained(base.init_from)
    train(changed(base, add_tokens=None, max_steps=1))
    assert GPT2.from_pretrained(base.out).config.vocab_size == OLD + 2


def test_another_tokenizer_is_still_refused(base, tmp_path):
    other = BPETokenizer.train([TEXT[::-1]], 290).with_tokens(NEW)
    other.save_pretrained(tmp_path / "other")
    wrong = changed(base, tokenizer=str(tmp_path / "other"), add_tokens=None)
    with pytest.raises(DataError, match=r"the model's \(\d+ tokens\): the id \d+ is .* in the"):
        train(wrong)


@pytest.mark.parametrize("fixed", [{"lora_rank": 2}, {"freeze": "wte"}, {"freeze": "w*"}])
def test_new_tokens_that_could_not_be_learned_are_refused(base, fixed, tmp_path):
    with pytest.raises(ConfigError, match="the data hold tokens that .* does not know"):
        train(changed(base, **fixed))
    # Without one of them in the text there is nothing to learn.
    (tmp_path / "plain.txt").write_text(TEXT)
    plain = changed(base, data=str(tmp_path / "plain.txt"), max_steps=1, **fixed)
    train(changed(plain, out=str(tmp_path / "plain")))
    assert GPT2.from_pretrained(tmp_path / "plain").config.vocab_size == OLD + 2


def test_the_embedding_alone_is_trained_first_as_the_error_says(base, tmp_path):
    train(changed(base, freeze="wpe,h,ln_f"))
    adapted = changed(base, init_from=base.out, lora_rank=2, add_tokens=None, max_steps=1)
    train(changed(adapted, out=str(tmp_path / "lora")))
    before, after = (GPT2.from_pretrained(path) for path in (base.out, tmp_path / "lora"))
    assert torch.equal(before.wte.weight, after.wte.weight)


def test_flags_take_any_text_as_tokens():
    tokens = ["<|user|>", "[INST]", "null", "a: b", "3"]
    config, _ = parse(["--data", "x", "--add-tokens", *tokens, "--out", "y"])
    assert config.add_tokens == tokens
    config, _ = parse(["--data", "x", "--add-tokens=[INST]", "--lr", "1"])
    assert config.add_tokens == ["[INST]"]
    assert json.loads(json.dumps(config.to_dict()))["add_tokens"] == ["[INST]"]
    assert parse(["--data", "x", "--add-tokens", "null"])[0].add_tokens is None
    for wrong in ([], [""], [3], "x"):
        with pytest.raises(ConfigError, match="add_tokens is"):
            TrainConfig(data="x", add_tokens=wrong)
