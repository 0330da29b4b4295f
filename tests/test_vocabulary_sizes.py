"""A tokenizer with more tokens than its model has embeddings, or with fewer."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
import transformers

from gpt2fast import GPT2, Generator
from gpt2fast.cli.generate import main
from gpt2fast.errors import GenerationError, TokenizerError
from gpt2fast.evaluation import Scorer
from gpt2fast.evaluation.likelihood import Request
from gpt2fast.tokenizer import LibraryTokenizer
from small_bpe import BPE, SIZE, random_model

PADDED = SIZE + 60
PROMPTS = ["the quick", "a fox jumps over"]
FORMS = [{}, {"pack": True}, {"quantize": "int8"}, {"dtype": "bfloat16"}, {"dtype": "float16"}]


@pytest.fixture(scope="module", params=[SIZE, PADDED], ids=["embeddings lack", "room"])
def folder(request, tmp_path_factory):
    """A model whose tokenizer has got a padding token since."""
    path = tmp_path_factory.mktemp("model")
    random_model(request.param).save_pretrained(path, BPE)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    theirs.add_special_tokens({"pad_token": "<|pad|>", "additional_special_tokens": ["<|user|>"]})
    theirs.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    path = tmp_path_factory.mktemp("lacking")
    random_model(SIZE).save_pretrained(path, BPE.with_tokens(["<|pad|>", "<|user|>"]))
    return path


def theirs(folder, prompt, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    out = model.generate(**ids, pad_token_id=SIZE - 1, **options)[0]
    return out[ids["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_padding_token_that_the_model_lacks_changes_nothing(lacking, beams):
    for options in ({}, {"pack": True}):
        generator = Generator.from_pretrained(lacking, **options)
        found = generator(PROMPTS, max_new_tokens=8, do_sample=False, num_beams=beams)
        for prompt, result in zip(PROMPTS, found, strict=True):
            expected = theirs(lacking, prompt, max_new_tokens=8, do_sample=False, num_beams=beams)
            assert result.tokens == expected


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_way_of_choosing_works(folder, form):
    generator = Generator.from_pretrained(folder, **form)
    assert generator.tokenizer.vocab_size == SIZE + 2
    for options in (
        {"do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_return_sequences": 3, "logprobs": True},
        {"temperature": 9.0, "top_k": None, "top_p": None, "stop": "zzz"},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"top_k": 10**6, "min_p": 0.01},
    ):
        found = generator(PROMPTS, max_new_tokens=25, seed=1, eos_token_id=None, **options)
        for result in [x for y in found for x in (y if isinstance(y, list) else [y])]:
            assert result.new_tokens == 25
            assert all(token in generator.tokenizer for token in result.tokens)
            assert max(result.tokens) < generator.model.config.vocab_size
    assert isinstance("".join(generator.stream("the", max_new_tokens=9, seed=2)), str)


def test_the_whole_vocabulary_comes_once_the_model_has_it(lacking):
    generator = Generator.from_pretrained(lacking)
    generator("the", max_new_tokens=2)
    with pytest.raises(GenerationError, match="the token '<.user.>' with the id"):
        generator("<|user|>the", max_new_tokens=2)
    model = generator.model
    model.resize_token_embeddings(SIZE + 2)
    with torch.no_grad():
        model.wte.weight[SIZE + 1] = 9 * model.wte.weight[:SIZE].mean(0)
    options = {"temperature": 1e6, "top_k": None, "top_p": None, "eos_token_id": None}
    tokens = [
        token
        for result in generator(["the<|user|>"] * 40, max_new_tokens=50, seed=3, **options)
        for token in result.tokens
    ]
    assert set(range(SIZE, SIZE + 2)) <= set(tokens)  # 2,000 draws of 290


@pytest.mark.parametrize("form", [{}, {"pack": True}, {"quantize": "int8"}], ids=str)
def test_a_prompt_with_a_token_that_the_model_lacks_is_named(lacking, form):
    generator = Generator.from_pretrained(lacking, **form)
    says = rf"prompt 2 of 2 has the token '<\|user\|>' with the id {SIZE + 1}, which was added to"
    with pytest.raises(GenerationError, match=says):
        generator(["the", "<|user|>the"], max_new_tokens=5)
    with pytest.raises(GenerationError, match="'<.pad.>'.*go from 0 to"):
        generator.stream("the <|pad|>")
    with pytest.raises(GenerationError, match="'<.pad.>'.*resize_token_embeddings"):
        generator.check("the <|pad|>")


def test_an_end_token_that_the_model_lacks_never_comes(lacking):
    tokenizer = transformers.AutoTokenizer.from_pretrained(lacking)
    tokenizer.eos_token = "<|user|>"
    generator = Generator(GPT2.from_pretrained(lacking), tokenizer)
    for options in ({"do_sample": False}, {"num_beams": 2}):
        expected = theirs(lacking, "the", max_new_tokens=9, **{"do_sample": False, **options})
        assert generator("the", max_new_tokens=9, **options).tokens == expected


def test_the_command_line(folder, tmp_path, capsys, monkeypatch):
    model = ["--model", str(folder), "--seed", "1", "--max-new-tokens", "9"]
    for options in ([], ["--greedy"], ["--num-beams", "2"], ["--quantize", "int8"]):
        assert main([*model[: 2 if options else 4], "--max-new-tokens", "9", *options, "the"]) == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the quick\n\na fox\n")
    assert main([*model, "--prompts-file", str(prompts), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2]
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\n<|user|>\nfox\n"))
    assert main([*model, "--interactive"]) == 0
    answers = capsys.readouterr()
    lacks = GPT2.from_pretrained(folder).config.vocab_size == SIZE
    assert ("error: the prompt has the token '<|user|>'" in answers.err) is lacks
    assert main([*model, "<|user|>the"]) == int(lacks)
    told = capsys.readouterr().err
    assert (f"'<|user|>' with the id {SIZE + 1}" in told) is lacks
    assert "Traceback" not in told


@pytest.mark.parametrize("pick", [lambda t: t, lambda t: t.backend_tokenizer], ids=["fast", "rust"])
def test_stops_are_found_beside_ids_without_a_token(folder, tmp_path, pick):
    """`generate` chooses among all of the model's ids, as in transformers."""
    model = random_model(PADDED)
    ids = torch.tensor([[5, 6]])
    options = {"max_new_tokens": 40, "do_sample": True, "temperature": 3.0, "seed": 0}
    free = model.generate(ids, eos_token_id=None, **options)[0, 2:].tolist()
    assert any(token >= SIZE for token in free[:20])
    known = [token for token in free[:30] if token < SIZE]
    stop = BPE.decode(known[-2:])
    assert stop.isascii() and stop not in BPE.decode(known[:-1])
    BPE.save_pretrained(tmp_path)
    hf = pick(transformers.AutoTokenizer.from_pretrained(tmp_path))
    for form in (model, model.pack()):
        for tokenizer in (BPE, hf):
            out = form.generate(ids, eos_token_id=None, stop=stop, tokenizer=tokenizer, **options)
            assert out[0, 2:].tolist() == free[: free.index(known[-1], 20) + 1]


@pytest.mark.parametrize("tokenizer", ["gpt2", 7, object()])
def test_what_is_no_tokenizer_is_named(tokenizer):
    model = random_model(SIZE)
    with pytest.raises(TokenizerError, match=f"{type(tokenizer).__name__} is no tokenizer"):
        model.generate(torch.tensor([[1]]), stop="x", tokenizer=tokenizer)
    with pytest.raises(TokenizerError, match="is no tokenizer"):
        Generator(model, tokenizer)


def test_ids_between_those_of_the_tokenizer_have_no_text():
    vocab = {"<unk>": 0, "a": 1, "b": 2, "c": 50}
    content = {
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None, "decoder": None,
    }  # fmt: skip
    generator = Generator(random_model(60), LibraryTokenizer(content), notify=lambda line: None)
    result = generator("a b", max_new_tokens=40, seed=1, temperature=5.0, top_k=None, top_p=None)
    assert any(token not in generator.tokenizer for token in result.tokens)
    known = [token for token in result.tokens if token in generator.tokenizer]
    assert result.text == generator.tokenizer.decode(known)


def test_an_id_without_a_token_is_still_an_error_to_decode():
    with pytest.raises(TokenizerError, match="padded vocabulary, leave out what is not `in`"):
        BPE.decode([1, PADDED])
    assert PADDED not in BPE and SIZE - 1 in BPE and -1 not in BPE
    ids = torch.tensor([1, PADDED, 2])
    assert BPE.decode([id for id in ids if id in BPE]) == BPE.decode([1, 2])
    assert "a" not in BPE and None not in BPE


def test_scores_take_the_tokens_that_there_are(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    scorer = Scorer(GPT2.from_pretrained(folder), tokenizer)
    context, ending = scorer.encode("the quick", " brown fox")
    ((found,),) = scorer.score([Request(context, [ending])])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.tensor([context + ending])).logits[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(ending) - 1)
    expected = sum(logits[at, token].item() for at, token in zip(places, ending, strict=True))
    assert found.total == pytest.approx(expected, rel=1e-4)


def test_a_scored_token_that_the_model_lacks_is_named(lacking):
    generator = Generator.from_pretrained(lacking)
    scorer = Scorer(generator.model, generator.tokenizer)
    for request in (Request([1], [scorer.encode("a", "<|pad|>")[1]]), Request([SIZE], [[1], [2]])):
        with pytest.raises(GenerationError, match="an example has the token '<.pad.>'"):
            scorer.score([request])
