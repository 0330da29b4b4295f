"""The token that an empty prompt begins with: transformers' `bos_token_id`, if there is one."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers

from gpt2fast import GPT2, Generator, GPT2Config
from gpt2fast.cli.generate import main
from gpt2fast.errors import GenerationError
from gpt2fast.tokenizer import BPETokenizer, CharTokenizer

TEXT = "the quick brown fox jumps over the lazy dog and runs away, as far as it can. " * 40
BPE = BPETokenizer.train([TEXT], 290)
SIZE = BPE.vocab_size
END = BPE.eos_token_id
ABSENT = "absent"
EMPTY = torch.empty(1, 0, dtype=torch.int64)

CASES = [  # config.json, generation_config.json, what begins
    (7, ABSENT, 7),
    (7, None, 7),
    (7, 9, 9),
    (None, 9, 9),
    (0, 0, 0),
    (None, None, None),
    (50256, ABSENT, None),
    (50256, 50256, None),
    (SIZE - 2, -1, None),
]


def make(folder, config_bos, generation_bos, tokenizer=BPE, eos=END):
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=SIZE, n_positions=32, initializer_range=0.3,
        bos_token_id=config_bos, eos_token_id=eos,
    )  # fmt: skip
    GPT2(config).save_pretrained(folder, tokenizer)
    path = folder / "generation_config.json"
    values = {"eos_token_id": eos}
    if generation_bos == ABSENT:
        path.unlink()
    else:
        path.write_text(json.dumps({**values, "bos_token_id": generation_bos}))
    return folder


def theirs(folder, first, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.generate(bos_token_id=first, max_new_tokens=6, do_sample=False, **options).tolist()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("config", "generation", "first"), CASES)
def test_tokens_begin_where_transformers_begins(config, generation, first, beams, tmp_path):
    folder = make(tmp_path, config, generation)
    model = GPT2.from_pretrained(folder)
    options = {"max_new_tokens": 6, "num_beams": beams}
    if first is None:
        for ids in (None, EMPTY):
            with pytest.raises(GenerationError, match="names no bos_token_id to begin with"):
                model.generate(ids, **options)
        return
    expected = theirs(folder, first, num_beams=beams)
    assert expected[0][0] == first
    with torch.no_grad():
        reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
        if reference.generation_config.bos_token_id is not None:
            assert expected == reference.generate(
                max_new_tokens=6, do_sample=False, num_beams=beams
            ).tolist()  # fmt: skip
    for form in (model, model.pack()):
        for ids in (None, EMPTY, EMPTY.float(), [[]]):
            assert form.generate(ids, **options).tolist() == expected
        assert form.generate(EMPTY, EMPTY, **options).tolist() == expected
        assert form.generate(EMPTY.expand(3, 0), **options).tolist() == expected * 3


def test_a_row_of_padding_alone_begins_there_too(tmp_path):
    model = GPT2.from_pretrained(make(tmp_path, 7, ABSENT))
    ids = torch.tensor([[3, 3, 3], [3, 5, 6]])
    mask = torch.tensor([[0, 0, 0], [0, 1, 1]])
    found = model.generate(ids, mask, max_new_tokens=6, eos_token_id=None)
    nothing = model.generate(max_new_tokens=6, eos_token_id=None)
    assert found[0, 3:].tolist() == nothing[0, 1:].tolist()
    alone = model.generate(ids[1:, 1:], max_new_tokens=6, eos_token_id=None)
    assert found[1, 3:].tolist() == alone[0, 2:].tolist()
    model.config = dataclasses.replace(model.config, bos_token_id=None, dropout=None)
    with pytest.raises(GenerationError, match="row 0 of input_ids has no token that"):
        model.generate(ids, mask)


def test_what_is_not_empty_is_not_begun(tmp_path):
    model = GPT2.from_pretrained(make(tmp_path, 7, ABSENT))
    assert model.generate(torch.tensor([[5]]), max_new_tokens=1)[0, 0] == 5
    with pytest.raises(GenerationError, match=r"attention_mask has shape \(1, 2\), and"):
        model.generate(None, torch.ones(1, 2))
    with pytest.raises(GenerationError, match=r"has shape \(0, 3\)"):
        model.generate(torch.zeros(0, 3, dtype=torch.int64))


@pytest.mark.parametrize(("config", "generation", "first"), CASES)
def test_texts_begin_there_or_with_the_end_token(config, generation, first, tmp_path):
    folder = make(tmp_path, config, generation)
    expected = theirs(folder, END if first is None else first)[0][1:]
    for options in ({}, {"pack": True}):
        generator = Generator.from_pretrained(folder, **options)
        found = generator("", max_new_tokens=6, do_sample=False)
        assert found.tokens == expected and found.prompt_tokens == 1 and found.prompt == ""
        assert generator(["", "the"], max_new_tokens=6, do_sample=False)[0].tokens == expected
        stream = generator.stream("", max_new_tokens=6, do_sample=False)
        assert "".join(stream) == found.text
    pipeline = transformers.pipeline("text-generation", model=str(folder))
    if pipeline.model.generation_config.bos_token_id == first is not None:
        (theirs_too,) = pipeline("", max_new_tokens=6, do_sample=False, return_tensors=True)
        assert theirs_too["generated_token_ids"][1:] == expected


def test_a_tokenizer_that_begins_texts_itself_has_the_say(tmp_path):
    template = BPETokenizer(
        BPE._vocab, BPE._merges, BPE.added_tokens, special_tokens=BPE._special_tokens,
        around=([11], []),
    )  # fmt: skip
    folder = make(tmp_path, 7, ABSENT, template)
    found = Generator.from_pretrained(folder)("", max_new_tokens=6, do_sample=False)
    assert found.tokens == theirs(folder, 11)[0][1:]


def test_nothing_to_begin_with(tmp_path):
    tokenizer = CharTokenizer.train(["abc"])
    folder = make(tmp_path, None, None, tokenizer, eos=None)
    generator = Generator.from_pretrained(folder, notify=lambda line: None)
    with pytest.raises(GenerationError, match="the prompt is empty, and neither is there a bos"):
        generator("")


def test_the_command_line_begins_there(tmp_path, capsys):
    folder = make(tmp_path, 7, 9)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\nthe\n")
    arguments = ["--model", str(folder), "--greedy", "--max-new-tokens", "6"]
    assert main([*arguments, "--prompts-file", str(prompts), "--json"]) == 0
    first, _ = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["tokens"] == theirs(folder, 9)[0][1:]
    assert main([*arguments, ""]) == 0
    assert capsys.readouterr().out == first["text"] + "\n"
