"""Wherever a tokenizer is taken, one of transformers or tokenizers is, and nothing else."""

from __future__ import annotations

import pytest
import torch
import transformers

from gpt2fast import Generator, Tokenizer
from gpt2fast.data import DataModule
from gpt2fast.data.prepare import prepare_data
from gpt2fast.errors import TokenizerError
from gpt2fast.evaluation import Scorer, evaluate
from gpt2fast.tokenizer import BPETokenizer, LibraryTokenizer
from gpt2fast.tokenizer.foreign import ForeignTokenizer
from small_bpe import BPE, TEXT, random_model

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
NO_TOKENIZERS = ["gpt2", 7, object(), {"a": 1}, b"x"]


class Spelled(transformers.GPT2Tokenizer):
    """A class of somebody's own, which is asked and not converted."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    BPE.save_pretrained(folder)
    return folder


@pytest.fixture(params=["transformers", "of one's own", "tokenizers", "ours"])
def tokenizer(request, files):
    if request.param == "ours":
        return Tokenizer.from_pretrained(files)
    if request.param == "of one's own":
        return Spelled.from_pretrained(files)
    found = transformers.AutoTokenizer.from_pretrained(files)
    return found if request.param == "transformers" else found.backend_tokenizer


@pytest.fixture(scope="module")
def model():
    return random_model()


def test_kinds(files):
    assert isinstance(Tokenizer.of(Spelled.from_pretrained(files)), ForeignTokenizer)
    assert Tokenizer.of(BPE) is BPE


@pytest.mark.parametrize("form", ["plain", "packed", "int8"])
def test_models_are_saved_with_them(model, form, tokenizer, tmp_path):
    saved = {"plain": lambda: model, "packed": model.pack, "int8": lambda: model.quantize("int8")}
    saved[form]().save_pretrained(tmp_path, tokenizer)
    assert Tokenizer.from_pretrained(tmp_path).encode(TEXT[:200]) == BPE.encode(TEXT[:200])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(TEXT[:200]) == BPE.encode(TEXT[:200])
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not any(name.startswith(".") for name in names)
    assert Generator.from_pretrained(tmp_path)("the", max_new_tokens=3).new_tokens == 3


def test_what_only_transformers_knows_is_saved_too(model, files, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(files)
    tokenizer.chat_template, tokenizer.model_max_length = TEMPLATE, 48
    model.save_pretrained(tmp_path, tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == TEMPLATE and again.model_max_length == 48
    assert Tokenizer.from_pretrained(tmp_path).difference(BPE) is None


def test_texts_are_scored_with_them(model, tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT[:400])
    data = {"perplexity": str(tmp_path / "text.txt")}
    (found,), (expected,) = (
        evaluate(model, each, ["perplexity"], data=data) for each in (tokenizer, BPE)
    )
    assert found.metrics == expected.metrics
    scorer = Scorer(model, tokenizer)
    assert isinstance(scorer.tokenizer, Tokenizer)
    if not isinstance(tokenizer, Tokenizer) and hasattr(tokenizer, "bos_token"):
        assert scorer.encode("", "the fox") == ([BPE.eos_token_id], BPE.encode("the fox"))


def test_data_are_prepared_with_them(tokenizer, files, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    made = prepare_data(tmp_path / "book.txt", tmp_path / "data", tokenizer=tokenizer)
    expected = prepare_data(tmp_path / "book.txt", tmp_path / "same", tokenizer=files)
    assert made.train_file.read_bytes() == expected.train_file.read_bytes()
    data = DataModule(made.directory, 8, 2)
    data.check_tokenizer(BPE)
    data.check_tokenizer(data.tokenizer)


def test_a_generator_loads_with_them(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    found = Generator.from_pretrained(tmp_path, tokenizer=tokenizer)
    assert found("the fox", max_new_tokens=5, seed=1) == Generator(model, BPE)(
        "the fox", max_new_tokens=5, seed=1
    )


@pytest.mark.parametrize("wrong", NO_TOKENIZERS, ids=lambda wrong: type(wrong).__name__)
def test_what_is_none_is_refused_before_anything_is_done(model, wrong, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    is_name = isinstance(wrong, str)
    uses = [
        lambda: model.save_pretrained(tmp_path / "model", wrong),
        lambda: model.pack().save_pretrained(tmp_path / "model", wrong),
        lambda: Scorer(model, wrong),
        lambda: evaluate(model, wrong, ["perplexity"], data={"perplexity": tmp_path / "book.txt"}),
        lambda: model.generate(torch.tensor([[1]]), stop="x", tokenizer=wrong),
        lambda: Generator(model, wrong),
    ]
    if not is_name:
        uses += [lambda: prepare_data(tmp_path / "book.txt", tmp_path / "data", tokenizer=wrong)]
    for use in uses:
        with pytest.raises(TokenizerError, match=f"{type(wrong).__name__} is no tokenizer: give"):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


# The token that begins texts: lm-evaluation-harness takes bos_token, or else eos_token.


@pytest.mark.parametrize("kind", ["bpe", "words", "foreign"])
def test_an_empty_context_begins_with_the_token_for_that(model, kind, files):
    if kind == "bpe":
        grown = BPETokenizer(
            BPE._vocab, BPE._merges, BPE.added_tokens,
            special_tokens={"bos_token": "a", "eos_token": "<|endoftext|>"},
        )  # fmt: skip
    elif kind == "words":
        vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "fox": 3}
        content = {
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
            "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None, "decoder": None,
        }  # fmt: skip
        grown = LibraryTokenizer(content, {"bos_token": "<s>", "eos_token": "</s>"})
    else:
        theirs = Spelled.from_pretrained(files)
        theirs.bos_token = "a"
        grown = Tokenizer.of(theirs)
    first = 1 if kind == "words" else BPE.encode("a")[0]
    assert grown.start_token_id == grown.bos_token_id == first != grown.eos_token_id
    assert Scorer(model, grown).encode("", "fox")[0] == [first]
    assert BPE.start_token_id == BPE.eos_token_id == BPE.bos_token_id


def test_texts_are_predicted_from_it(model, tmp_path):
    begun = BPETokenizer(
        BPE._vocab, BPE._merges, BPE.added_tokens,
        special_tokens={"bos_token": "a", "eos_token": "<|endoftext|>"},
    )  # fmt: skip
    text = TEXT[:60]
    (tmp_path / "text.txt").write_text(text)
    (found,) = evaluate(model, begun, ["perplexity"], data={"perplexity": tmp_path / "text.txt"})
    tokens = torch.tensor([[begun.bos_token_id, *BPE.encode(text)]])
    with torch.no_grad():
        expected = model(tokens[:, :-1], targets=tokens[:, 1:]).loss.exp().item()
    assert found.metrics["token_perplexity"].value == pytest.approx(expected, rel=1e-5)
