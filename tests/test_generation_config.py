"""generation_config.json, against transformers' generate on the same folder."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt2fast import GPT2, GPT2Config
from gpt2fast.errors import ConfigError, GenerationError
from gpt2fast.inference.generator import Generator
from gpt2fast.lora import add_adapters
from gpt2fast.tokenizer import CharTokenizer

LETTERS = "".join(chr(48 + number) for number in range(61))
PROMPT = torch.tensor([[5, 7, 9], [1, 2, 3]])


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(2)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=61, n_positions=64, initializer_range=0.4,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    GPT2(config).save_pretrained(tmp_path)
    return tmp_path


def say(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))


def both(folder, **options):
    """Results of our and transformers' generate for the prompt."""
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    expected = theirs.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **options)
    return GPT2.from_pretrained(folder).generate(PROMPT, **options), expected


def freely(folder):
    return GPT2.from_pretrained(folder).generate(PROMPT, max_new_tokens=12)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("several", [False, True])
def test_its_end_tokens_end_a_text(folder, several, beams):
    free = freely(folder)
    ends = [int(free[0, 6]), int(free[1, 8])] if several else int(free[0, 6])
    say(folder, eos_token_id=ends, pad_token_id=0)
    found, expected = both(folder, num_beams=beams)
    assert found.tolist() == expected.tolist()
    if beams == 1:
        assert found.shape[1] < free.shape[1] or not several


def test_it_wins_over_config_json_and_an_argument_wins_over_it(folder):
    free = freely(folder)
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = int(free[0, 4])
    (folder / "config.json").write_text(json.dumps(config))
    say(folder, eos_token_id=[int(free[0, 7])], pad_token_id=3)
    found, expected = both(folder)
    assert found.tolist() == expected.tolist()
    found, expected = both(folder, eos_token_id=int(free[1, 5]))
    assert found.tolist() == expected.tolist()


def test_end_tokens_listed_in_config_json_count(folder):
    free = freely(folder)
    ends = [int(free[0, 6]), int(free[1, 6])]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
    (folder / "generation_config.json").unlink()
    model = GPT2.from_pretrained(folder)
    assert model.generate(PROMPT, max_new_tokens=12).shape[1] < free.shape[1]
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    expected = theirs.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=12, do_sample=False
    )
    assert model.generate(PROMPT, max_new_tokens=12).tolist() == expected.tolist()


@pytest.mark.parametrize("form", ["model", "packed", "quantized", "adapted"])
def test_it_is_kept_and_written_back(folder, tmp_path, form):
    ends = [int(token) for token in freely(folder)[0, 5:7]]
    written = {"eos_token_id": ends, "pad_token_id": 3, "somebodys_own": {"a": [1]}}
    say(folder, **written)
    model = GPT2.from_pretrained(folder)
    if form == "packed":
        model = model.pack()
    elif form == "quantized":
        model = model.quantize("int8")
    elif form == "adapted":
        add_adapters(model, rank=2)
    expected = model.generate(PROMPT, max_new_tokens=12)
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert {name: saved[name] for name in written} == written
    again = GPT2.from_pretrained(tmp_path / "again")
    assert again.generation_config["eos_token_id"] == ends
    assert again.generate(PROMPT, max_new_tokens=12).tolist() == expected.tolist()


def test_what_is_not_taken_over_is_named_once(folder, caplog):
    say(folder, eos_token_id=3, do_sample=True, temperature=0.7, forced_bos_token_id=4, top_k=50)
    with caplog.at_level(logging.WARNING, logger="gpt2fast"):
        GPT2.from_pretrained(folder)
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "temperature=0.7 (pass them), forced_bos_token_id=4 (it has no such settings)"
    )
    assert "top_k" not in record.getMessage() and "eos_token_id" not in record.getMessage()


BAD = [[token, other] for token in range(61) for other in range(0, 61, 2)] + [[3], [5]]
SETTINGS = {
    "bad_words_ids": BAD, "min_new_tokens": 4, "max_length": 11, "epsilon_cutoff": 0.3,
    "eta_cutoff": 0.3, "max_time": 1e6,
}  # fmt: skip


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("form", ["model", "packed"])
@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_settings_of_generation_are_those_of_transformers(folder, place, form, beams, caplog):
    free = freely(folder)
    ends = sorted({int(free[0, 3]), int(free[1, 3])})
    written = {**SETTINGS, "eos_token_id": ends, "pad_token_id": 0}
    if place == "config.json":
        (folder / "generation_config.json").unlink(missing_ok=True)
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **written}))
    else:
        say(folder, **written)
    with caplog.at_level(logging.WARNING, logger="gpt2fast"):
        model = GPT2.from_pretrained(folder)
    assert not caplog.records
    model = model.pack() if form == "packed" else model
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    for own in ({}, {"max_new_tokens": 3}, {"max_new_tokens": 9, "min_new_tokens": 7}):
        found = model.generate(PROMPT, num_beams=beams, pad_token_id=0, **own)
        expected = theirs.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, num_beams=beams,
            pad_token_id=0, **own,
        )  # fmt: skip
        assert found.tolist() == expected.tolist()
        assert found.tolist() != free[:, : found.shape[1]].tolist()
    assert model.generate(PROMPT, num_beams=beams, eos_token_id=None).shape[1] == 11
    off = dict.fromkeys(("bad_words_ids", "min_new_tokens", "max_length"))
    switched_off = model.generate(PROMPT, eos_token_id=None, max_new_tokens=12, **off)
    assert switched_off.tolist() == free.tolist()
    model.save_pretrained(folder / "again")
    saved = json.loads((folder / "again" / "generation_config.json").read_text())
    assert {name: saved[name] for name in SETTINGS} == SETTINGS


def test_max_new_tokens_goes_before_max_length(folder):
    for written, length in (
        ({"max_length": 11, "max_new_tokens": 5}, 8),
        ({"max_length": 20}, 20),
        ({"max_new_tokens": 7}, 10),
        ({"min_new_tokens": 90}, 23),
    ):
        say(folder, eos_token_id=None, pad_token_id=0, **written)
        found = GPT2.from_pretrained(folder).generate(PROMPT)
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
        expected = theirs.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, pad_token_id=0
        )
        assert found.tolist() == expected.tolist()
        assert found.shape[1] == length


def test_cutoffs_of_the_file_count_where_tokens_are_drawn(folder):
    say(folder, eos_token_id=None, epsilon_cutoff=0.2)
    model = GPT2.from_pretrained(folder)
    options = {"max_new_tokens": 12, "do_sample": True, "seed": 4}
    drawn = model.generate(PROMPT, **options)
    assert drawn.tolist() == model.generate(PROMPT, epsilon_cutoff=0.2, **options).tolist()
    assert drawn.tolist() != model.generate(PROMPT, epsilon_cutoff=None, **options).tolist()


def test_a_generator_takes_the_settings_that_a_call_does_not_give(folder):
    say(folder, eos_token_id=None, max_length=9, bad_words_ids=[[3], [5]], pad_token_id=0)
    tokenizer = CharTokenizer({letter: id for id, letter in enumerate(LETTERS)})
    generator = Generator(GPT2.from_pretrained(folder), tokenizer, window="stop")
    result = generator("abc", temperature=0)
    assert result.new_tokens == 6 and not {3, 5} & set(result.tokens)
    assert generator("abc", temperature=0, max_new_tokens=8).new_tokens == 8
    assert generator("abc", temperature=0, max_length=None).new_tokens == 61
    with pytest.raises(GenerationError, match="9 tokens, and max_length .* is 9.*max_new_tokens"):
        generator("abcabcabc")


def test_the_text_that_calibrates_is_not_cut_by_the_file(folder):
    say(folder, eos_token_id=None)
    expected = GPT2.from_pretrained(folder).quantize("int4").weights.arena
    say(folder, eos_token_id=None, max_time=1e-9, bad_words_ids=[[3]], epsilon_cutoff=0.9)
    assert torch.equal(GPT2.from_pretrained(folder).quantize("int4").weights.arena, expected)


@pytest.mark.parametrize(
    ("written", "length"),
    [
        ({"max_length": 10.0}, 10),
        ({"max_new_tokens": 5.0}, 8),
        ({"max_new_tokens": 5.5}, 9),
        ({"max_time": 0}, 4),
        ({"max_time": -1.5}, 4),
        ({"epsilon_cutoff": 2}, 23),
        ({"eta_cutoff": -1}, 23),
        ({"eta_cutoff": 0}, 23),
        ({"min_new_tokens": -3, "max_length": 9}, 9),
    ],
    ids=str,
)
def test_values_that_transformers_makes_do_with_mean_the_same(folder, written, length):
    say(folder, eos_token_id=None, pad_token_id=0, **written)
    model = GPT2.from_pretrained(folder)
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    found = model.generate(PROMPT)
    expected = theirs.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, pad_token_id=0
    )
    assert found.tolist() == expected.tolist() and found.shape[1] == length
    model.save_pretrained(folder / "again")
    saved = json.loads((folder / "again" / "generation_config.json").read_text())
    assert {name: saved[name] for name in written} == written
    drawn = {"do_sample": True, "seed": 4, "max_new_tokens": 6, "max_time": None}
    off = dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_new_tokens"))
    assert (
        model.generate(PROMPT, **drawn).tolist() == model.generate(PROMPT, **drawn, **off).tolist()
    )


@pytest.mark.parametrize(
    "written",
    [
        {"bad_words_ids": [3]},
        {"bad_words_ids": "the"},
        {"epsilon_cutoff": "2"},
        {"eta_cutoff": "x"},
        {"max_length": -1},
        {"max_new_tokens": True},
        {"min_new_tokens": 5.0},
        {"min_new_tokens": 1.5},
        {"max_new_tokens": []},
        {"max_time": "0"},
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_one_clear_error(folder, written):
    say(folder, **written)
    (name,) = written
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {name} (is|has)"):
        GPT2.from_pretrained(folder)


def test_old_settings_in_config_json_are_named_where_transformers_takes_them(folder, caplog):
    (folder / "generation_config.json").unlink(missing_ok=True)
    values = json.loads((folder / "config.json").read_text())
    values |= {"repetition_penalty": 1.3, "min_length": 5}
    (folder / "config.json").write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING, logger="gpt2fast"):
        GPT2.from_pretrained(folder)
    (record,) = caplog.records
    assert "repetition_penalty=1.3 (pass them), min_length=5 (it has" in record.getMessage()
    say(folder, eos_token_id=3)
    caplog.clear()
    GPT2.from_pretrained(folder)
    assert not caplog.records


@pytest.mark.parametrize("content", [{}, {"eos_token_id": None}, {"pad_token_id": 0}, {"eos": 1}])
def test_without_an_end_token_in_it_config_json_has_none_either(folder, content):
    """transformers, which is asked here, agrees."""
    values = json.loads((folder / "config.json").read_text())
    ids = torch.tensor([[1, 2, 3]])
    (folder / "generation_config.json").unlink(missing_ok=True)
    free = GPT2.from_pretrained(folder).generate(ids, max_new_tokens=12, eos_token_id=None)
    values["eos_token_id"] = free[0, 5].item()
    (folder / "config.json").write_text(json.dumps(values))
    assert GPT2.from_pretrained(folder).generate(ids, max_new_tokens=12).shape[1] < 15
    (folder / "generation_config.json").write_text(json.dumps(content))
    theirs = GPT2LMHeadModel.from_pretrained(folder).generate(
        ids, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    ours = GPT2.from_pretrained(folder).generate(ids, max_new_tokens=12)
    assert torch.equal(ours, theirs) and ours.shape[1] == 15


def test_what_gpt2s_own_file_says_is_not_worth_a_word(folder, caplog):
    say(
        folder, _from_model_config=True, bos_token_id=50256, eos_token_id=50256,
        transformers_version="4.26.0.dev0",
    )  # fmt: skip
    GPT2.from_pretrained(folder)
    assert not caplog.records


@pytest.mark.parametrize(
    "content",
    [
        '{"eos_token_id": "end"}',
        '{"eos_token_id": [1, "x"]}',
        '{"eos_token_id": 1e30}',
        '{"pad_token_id": [1]}',
        '{"pad_token_id": true}',
        "[1]",
        "{",
        '{"eos_token_id": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"eos_token_id": ' + "9" * 5000 + "}",
    ],
    ids=lambda content: content[:24],
)
def test_a_damaged_file_is_one_clear_error(folder, content):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError) as error:
        GPT2.from_pretrained(folder)
    assert "generation_config.json" in str(error.value) and len(str(error.value)) < 600
