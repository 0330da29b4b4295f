"""`python -m gpt2fast.generate`: every flag, every way to fail, and its behaviour on a terminal."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from gpt2fast import GPT2, GPT2Config, Tokenizer, backend, config
from gpt2fast.checkpoints import hub
from gpt2fast.cli import prompt_progress
from gpt2fast.cli.generate import main
from gpt2fast.inference import generator as generator_module
from gpt2fast.inference.generator import Generation, Generator
from gpt2fast.lora import add_adapters, save_adapter
from gpt2fast.ops.backend import requested_backend
from gpt2fast.tokenizer import BPETokenizer

PROMPT = "Once upon a time"
TEXT = "Once upon a time the cat sat on the mat. The dog sat there too, and so it goes on. "


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A small random model with its tokenizer, as `save_pretrained` writes it."""
    tokenizer = BPETokenizer.train([TEXT * 10], 300)
    torch.manual_seed(1)
    model = GPT2(
        GPT2Config(
            vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=32, n_layer=2, n_head=2,
            initializer_range=0.2, eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, tokenizer)
    return folder


@pytest.fixture(scope="module")
def generator(model_dir):
    return Generator.from_pretrained(model_dir, window="slide", notify=lambda message: None)


@pytest.fixture(autouse=True)
def default_backend():
    yield
    backend("auto")


@pytest.fixture
def run(model_dir, capsys, monkeypatch):
    """Run the command line here; returns exit code, standard output and standard error."""

    def run(*arguments, stdin=None, model=model_dir):
        if stdin is None:
            monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
        else:
            data = stdin if isinstance(stdin, bytes) else stdin.encode()
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        place = [] if model is None else ["--model", str(model)]
        try:
            code = main([*place, *(str(argument) for argument in arguments)])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def assert_one_error(result, code, *parts):
    """One line on standard error, nothing on standard output."""
    assert result[0] == code
    assert result[1] == ""
    lines = result[2].splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


DEFAULTS = {"seed": 3, "max_new_tokens": 30}


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("--temperature 1.7", {"temperature": 1.7}),
        ("--temperature 0", {"do_sample": False}),
        ("--temperature none", {"temperature": None}),
        ("--top-k 2", {"top_k": 2}),
        ("--top-k none", {"top_k": None}),
        ("--top-p 0.3", {"top_p": 0.3}),
        ("--top-p none", {"top_p": None}),
        ("--min-p 0.3", {"min_p": 0.3}),
        ("--repetition-penalty 2.5", {"repetition_penalty": 2.5}),
        ("--no-repeat-ngram-size 1", {"no_repeat_ngram_size": 1}),
        ("--seed 4", {"seed": 4}),
        ("--max-new-tokens 9", {"max_new_tokens": 9}),
        ("--greedy", {"do_sample": False}),
        ("--num-beams 3", {"num_beams": 3}),
        ("--stop e", {"stop": ["e"]}),
        ("--stop e --stop a", {"stop": ["e", "a"]}),
        # Other spellings.
        ("--max_new_tokens 9", {"max_new_tokens": 9}),
        ("--max-tokens 9", {"max_new_tokens": 9}),
        ("--max_tokens=9", {"max_new_tokens": 9}),
        ("--top_k=2", {"top_k": 2}),
        ("--do_sample --seed 4", {"seed": 4}),
    ],
)
def test_each_option_changes_the_text_as_the_library_does(run, generator, flags, options):
    base = [PROMPT, "--seed", 3, "--max-new-tokens", 30]
    code, plain, _ = run(*base)
    assert code == 0
    code, out, _ = run(*base, *flags.split())
    assert code == 0
    assert out == f"{generator(PROMPT, **{**DEFAULTS, **options})}\n"
    assert out != plain


def test_defaults_are_the_librarys(run, generator):
    code, out, _ = run(PROMPT, "--seed", 7)
    assert code == 0
    expected = generator(
        PROMPT, seed=7, max_new_tokens=100, temperature=0.8, top_k=50, top_p=0.95, do_sample=True
    )
    assert out == f"{expected}\n"
    assert expected.new_tokens == 100


def test_the_end_token_may_be_another_or_none(run, generator):
    tokens = generator(PROMPT, **DEFAULTS).tokens
    base = [PROMPT, "--seed", 3, "--max-new-tokens", 30, "--json"]
    ended = json.loads(run(*base, "--eos-token-id", tokens[9])[1])
    assert ended["tokens"] == tokens[: tokens.index(tokens[9]) + 1]
    assert ended["finish_reason"] == "eos"

    usual = generator.tokenizer.eos_token_id
    stop_at_usual = [*base, "--temperature", 5, "--top-k", 0, "--max-new-tokens", 500]
    assert json.loads(run(*stop_at_usual)[1])["finish_reason"] == "eos"
    unending = json.loads(run(*stop_at_usual, "--eos-token-id", "none")[1])
    assert unending["finish_reason"] == "length"
    assert usual in unending["tokens"]


def test_dtype_is_the_models(run, model_dir):
    flags = [PROMPT, "--seed", 3, "--max-new-tokens", 100, "--window", "slide"]
    low = Generator.from_pretrained(
        model_dir, dtype="bfloat16", window="slide", notify=lambda message: None
    )
    code, out, _ = run(*flags, "--dtype", "bfloat16")
    assert code == 0
    assert out == f"{low(PROMPT, seed=3, max_new_tokens=100)}\n"
    assert out != run(*flags)[1]


def test_without_a_seed_texts_differ(run):
    assert run(PROMPT)[1] != run(PROMPT)[1]


def test_length_penalty_changes_what_beams_return(run, generator):
    flags = [PROMPT, "--num-beams", 4, "--eos-token-id", 12, "--max-new-tokens", 20]
    short, long = (run(*flags, "--length-penalty", x)[1] for x in (-5, 5))
    assert short != long
    expected = generator(
        PROMPT, num_beams=4, eos_token_id=12, max_new_tokens=20, length_penalty=-5.0
    )
    assert short == f"{expected}\n"


def test_samples_and_prompts_are_written_apart(run, generator, tmp_path):
    code, out, _ = run(PROMPT, "--num-samples", 3, "--seed", 0, "--max-new-tokens", 9)
    results = generator(PROMPT, num_return_sequences=3, seed=0, max_new_tokens=9)
    assert code == 0
    assert out == "---\n".join(f"{result}\n" for result in results)

    prompts = [PROMPT, "The dog", "The cat sat"]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts), encoding="utf-8")
    code, out, _ = run("--prompts-file", file, "--seed", 0, "--max-new-tokens", 9)
    results = generator(prompts, seed=0, max_new_tokens=9)
    assert code == 0
    assert out == "---\n".join(f"{result}\n" for result in results)

    lines = tmp_path / "prompts.jsonl"
    lines.write_text(
        "\n".join([json.dumps(prompts[0]), *(json.dumps({"prompt": p}) for p in prompts[1:])])
    )
    assert run("--prompts-file", lines, "--seed", 0, "--max-new-tokens", 9)[1] == out
    dash = run("--prompts-file", "-", "--seed", 0, "--max-new-tokens", 9, stdin="\n".join(prompts))
    assert dash[1] == out


def test_the_prompt_comes_from_argument_option_or_standard_input(run):
    flags = ["--seed", 3, "--max-new-tokens", 9]
    expected = run(PROMPT, *flags)
    assert expected[0] == 0
    assert run(*PROMPT.split(), *flags) == expected
    assert run("--prompt", PROMPT, *flags) == expected
    assert run(f"--prompt={PROMPT}", *flags) == expected
    assert run(*flags, stdin=PROMPT + "\n") == expected
    assert run(*flags, "--", PROMPT) == expected
    spaced = run(*flags, stdin=f"  {PROMPT}\n\n")
    assert spaced[1].startswith(f"  {PROMPT}\n")
    empty = run(*flags, stdin="")
    assert empty[0] == 0
    assert empty[1] == run("<|endoftext|>", *flags)[1].removeprefix("<|endoftext|>")


def test_a_stop_may_be_a_newline(run, generator):
    # This vocabulary spells a newline; greedy text of a random model never has one.
    code, out, _ = run(PROMPT, "--stop", r"\n", "--stop", r"\t", "--greedy")
    assert code == 0
    assert out == f"{generator(PROMPT, do_sample=False, stop=[chr(10), chr(9)])}\n"


def test_every_spelling_of_the_model_loads_it(run, model_dir):
    expected = run(PROMPT, "--seed", 3)
    flags = ["--model-path", "--model_path", "--model-name", "--model_name", "--model_type"]
    flags += ["--model-type", "--from-pretrained", "--from_pretrained", "-m"]
    for flag in flags:
        assert run(flag, model_dir, PROMPT, "--seed", 3, model=None) == expected


def test_a_bare_state_dict_needs_preset_and_tokenizer(
    run, model_dir, generator, tmp_path, monkeypatch
):
    bare = tmp_path / "bare.pth"
    torch.save(generator.model.state_dict(), bare)
    expected = run(PROMPT, "--seed", 3)
    missing = run(PROMPT, model=bare)
    assert_one_error(missing, 1, "preset")
    monkeypatch.setitem(config.PRESETS, "gpt2-tiny", generator.model.config)
    assert_one_error(run(PROMPT, "--preset", "gpt2-tiny", model=bare), 1, "tokenizer")
    for preset in ("--preset", "--model_type"):
        found = run(PROMPT, "--seed", 3, preset, "gpt2-tiny", "--tokenizer", model_dir, model=bare)
        assert found == expected
    assert_one_error(run(PROMPT, "--preset", "gpt9", model=bare), 1, "gpt9", "gpt2-xl")


def test_the_bundled_model_is_the_default_and_says_so(run, model_dir, monkeypatch):
    monkeypatch.setattr(hub, "_bundled", lambda name: Path(model_dir))
    code, out, err = run(PROMPT, "--seed", 3, model=None)
    assert (code, out) == run(PROMPT, "--seed", 3)[:2]
    assert len(err.splitlines()) == 2  # the other line is about the window
    assert hub.BUNDLED in err.splitlines()[0]
    assert "--model gpt2" in err.splitlines()[0]
    assert hub.BUNDLED not in run(PROMPT, "--seed", 3)[2]


def test_the_window_slides_and_says_so_once_unless_told_otherwise(run):
    long = [PROMPT, "--max-new-tokens", 200, "--seed", 1, "--eos-token-id", "none"]
    code, slid, err = run(*long)
    assert code == 0
    assert len(err.splitlines()) == 1
    assert "newest 32 tokens" in err
    assert run(*long, "--window", "slide") == (code, slid, err)

    code, stopped, err = run(*long, "--window", "stop")
    assert code == 0
    assert err == ""
    assert slid.startswith(stopped[:-2])
    assert len(stopped) < len(slid)
    assert_one_error(run(*long, "--window", "error"), 1, "n_positions=64", "200")

    too_long = TEXT * 5
    assert run(too_long, "--max-new-tokens", 5)[0] == 0
    assert_one_error(run(too_long, "--window", "stop"), 1, "n_positions=64")


def test_json_has_a_line_for_each_result(run, generator):
    flags = ["--num-samples", 2, "--seed", 5, "--max-new-tokens", 6]
    code, out, err = run(PROMPT, "--json", *flags)
    assert (code, err) == (0, "")
    results = generator(PROMPT, num_return_sequences=2, seed=5, max_new_tokens=6)
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 2
    for number, (line, result) in enumerate(zip(lines, results, strict=True)):
        assert line == {
            "prompt": PROMPT,
            "sample": number,
            "text": result.text,
            "finish_reason": "length",
            "prompt_tokens": result.prompt_tokens,
            "new_tokens": 6,
            "tokens": result.tokens,
            "seed": 5,
        }
    again = json.loads(run(PROMPT, "--json")[1])
    assert run(PROMPT, "--seed", again["seed"])[1] == PROMPT + again["text"] + "\n"


@pytest.mark.parametrize("flags", [[], ["--num-beams", 2], ["--json", "--num-samples", 2]], ids=str)
def test_stats_go_to_standard_error(run, flags):
    code, out, err = run(PROMPT, "--stats", "--seed", 1, "--max-new-tokens", 8, *flags)
    assert code == 0
    assert out == run(PROMPT, "--seed", 1, "--max-new-tokens", 8, *flags)[1]
    for part in ("prefill", "time to first token", "decode", "tok/s", "GB/s"):
        assert part in err.splitlines()[-1]


def test_device_and_backend_are_obeyed(run):
    base = [PROMPT, "--seed", 3]
    expected = run(*base)
    assert run(*base, "--device", "cpu") == expected
    assert run(*base, "--backend", "reference")[0] == 0
    assert requested_backend() == "reference"
    backend("auto")
    assert_one_error(run(*base, "--backend", "fastest"), 1, "fastest", "reference")
    for device in ("abacus", "meta", "cuda:99", *([] if torch.cuda.is_available() else ["cuda"])):
        assert_one_error(run(*base, "--device", device), 1, f"--device {device}:", "has cpu")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--temperature nan", ["temperature", "nan", "at least 0"]),
        ("--temperature -1", ["temperature", "-1"]),
        ("--temperature warm", ["--temperature", "warm"]),
        ("--top-k 1.5", ["--top-k", "1.5"]),
        ("--top-p 7", ["--top-p is 7", "from 0 to 1"]),
        ("--max-new-tokens -4", ["--max-new-tokens is -4"]),
        ("--seed -1", ["seed", "-1"]),
        ("--num-samples 0", ["--num-samples is 0"]),
        ("--num-samples 2 --greedy", ["--num-samples is 2", "greedy", "leave out --greedy"]),
        ("--num-samples 2 --temperature 0", ["--num-samples is 2", "--num-beams"]),
        ("--num-beams 99999999999999999999", ["--num-beams is 9999", "at most"]),
        ("--model=", ["--model is empty"]),
        ("--tokenizer=", ["--tokenizer is empty"]),
        ("--num-samples 3 --num-beams 2", ["--num-beams", "--num-samples is 3"]),
        ("--num-beams 2 --do-sample", ["--num-beams", "--do-sample"]),
        ("--greedy --do_sample", ["--greedy", "--do-sample"]),
        ("--window wide", ["--window", "wide"]),
        ("--dtype int8", ["--dtype", "int8"]),
        ("--prompt again", ["prompt", "twice"]),
        ("--interactive --json", ["--json", "--interactive"]),
        ("--interactive --num-beams 2", ["--num-beams", "--interactive"]),
        ("--tempurature 1", ["--tempurature"]),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(run, flags, parts):
    assert_one_error(run(PROMPT, *flags.split()), 2, *parts)


def test_what_cannot_be_read_is_one_line_and_exit_code_1(run, tmp_path, model_dir):
    assert_one_error(run(PROMPT, model=tmp_path / "none"), 1, str(tmp_path / "none"))
    assert_one_error(run("--prompts-file", tmp_path / "none.txt"), 1, "none.txt")
    assert_one_error(run("--prompts-file", tmp_path), 1, str(tmp_path))
    assert_one_error(run(PROMPT, "--tokenizer", tmp_path / "t"), 1, str(tmp_path / "t"))
    (tmp_path / "empty.txt").write_text("")
    assert_one_error(run("--prompts-file", tmp_path / "empty.txt"), 1, "no prompts")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    assert_one_error(run("--prompts-file", tmp_path / "bad.jsonl"), 1, '"prompt"')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert_one_error(run("--prompts-file", tmp_path / "latin.txt"), 1, "UTF-8")
    assert_one_error(run(stdin=b"caf\xe9"), 1, "UTF-8")
    assert_one_error(run(PROMPT, "--eos-token-id", 99999), 1, "99999")


def test_an_unknown_model_without_a_network_names_the_way_out(run, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_one_error(run(PROMPT, model="nobody/nothing"), 1, "nobody/nothing", hub.BUNDLED)


def test_an_unknown_tokenizer_is_called_a_tokenizer(run, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_one_error(run(PROMPT, "--tokenizer", "no/body"), 1, "the tokenizer 'no/body'")


def test_a_tokenizer_of_another_vocabulary_is_noticed(run, tmp_path):
    for size, name in ((1000, "large"), (258, "small")):
        words = (f"{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{i} " * 3 for i in range(2000))
        BPETokenizer.train(words, size).save_pretrained(tmp_path / name)
    large = run(PROMPT, "--tokenizer", tmp_path / "large")
    assert_one_error(large, 1, "up to 998", "ends at 297", "tokenizer that belongs")
    # 40 unused rows of the model may be padding.
    code, _, err = run(PROMPT, "--tokenizer", tmp_path / "small", "--max-new-tokens", 2)
    assert (code, err) == (0, "")


def test_memory_that_a_processor_does_not_have_is_one_line(run, monkeypatch):
    def exhaust(*args, **options):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(Generator, "stream", exhaust)
    assert_one_error(run(PROMPT), 1, "out of memory")


def test_samples_without_number_come_as_they_are_made(run, monkeypatch):
    written = []

    def write(text):
        written.append(text)
        if len(written) == 40:
            raise BrokenPipeError

    monkeypatch.setattr("gpt2fast.cli.generate._write", write)
    flags = [PROMPT, "--seed", 0, "--max-new-tokens", 3]
    assert run(*flags, "--num-samples", 10**8, "--json")[0] == 0
    monkeypatch.undo()
    assert [json.loads(line)["sample"] for line in written] == list(range(40))
    assert run(*flags, "--num-samples", 40, "--json")[1] == "".join(written)


def test_a_prompt_ends_at_the_end_of_its_line_only(run, tmp_path):
    prompts = ["The\u2028cat", "The\fdog", "The\x85mat"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*prompts, ""]).encode())
    flags = ["--seed", 0, "--max-new-tokens", 3, "--json"]
    code, out, _ = run("--prompts-file", file, *flags)
    assert code == 0
    assert [json.loads(line)["prompt"] for line in out.split("\n")[:-1]] == prompts
    again = tmp_path / "out.jsonl"
    again.write_text(out, encoding="utf-8")
    assert run("--prompts-file", again, *flags) == (0, out, "")


def test_every_line_of_a_file_of_prompts_has_a_result(run, generator, tmp_path):
    prompts = ["", PROMPT, "", "  ", "The cat", ""]
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in prompts))
    flags = ["--greedy", "--max-new-tokens", 5, "--json"]
    code, out, _ = run("--prompts-file", file, *flags)
    results = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [result["index"] for result in results] == list(range(len(prompts)))
    assert [result["prompt"] for result in results] == prompts
    begin = torch.tensor([[generator.tokenizer.eos_token_id]])
    assert results[0]["tokens"] == generator.model.generate(begin, max_new_tokens=5)[0, 1:].tolist()


def test_a_line_of_json_keeps_its_id_and_has_its_own_options(run, generator, tmp_path):
    lines = [
        {"prompt": PROMPT, "id": "a", "max_new_tokens": 3, "temperature": 0},
        {"prompt": PROMPT, "id": 7, "seed": 5, "top_k": 9, "top_p": 0.9, "temperature": 1.5},
        {"prompt": PROMPT, "stop": ["e", "a"]},
        {"prompt": PROMPT},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    code, out, _ = run("--prompts-file", file, "--seed", 2, "--max-new-tokens", 8, "--json")
    results = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [result.get("id") for result in results] == ["a", 7, None, None]
    for line, result in zip(lines[:2], results, strict=False):
        own = {key: line[key] for key in line if key not in ("prompt", "id")}
        alone = generator(PROMPT, **{"seed": 2, "max_new_tokens": 8, **own})
        assert result["tokens"] == alone.tokens
    # The last two draw from one seed: they are two samples of the prompt.
    two = generator(PROMPT, num_return_sequences=2, seed=2, max_new_tokens=8)
    assert two[0].tokens[: len(results[2]["tokens"])] == results[2]["tokens"]
    assert two[1].tokens == results[3]["tokens"]
    assert not set("ea") & set(results[2]["text"])


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"max_tokens": 3}, "'max_tokens'"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": True}, "top_p is True"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"stop": 3}, "stop is 3"),
        ({"stop": [""]}, "stop is ['']"),
    ],
)
def test_a_wrong_option_of_a_line_is_refused_with_its_number(run, tmp_path, options, part):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"fine"\n\n{json.dumps({"prompt": "a", **options})}\n')
    assert_one_error(run("--prompts-file", file), 2, "line 3", part)


def test_a_line_too_long_for_its_own_options_stops_the_run_before_it_starts(run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"fine"\n{json.dumps({"prompt": "a", "max_new_tokens": 900})}\n')
    assert_one_error(
        run("--prompts-file", file, "--max-new-tokens", 3, "--window", "error"), 1, "line 2", "900"
    )


def test_sampling_options_without_effect_are_noted(run):
    code, _, err = run(PROMPT, "--greedy", "--temperature", 2, "--top-k", 3)
    assert code == 0
    assert err.splitlines()[0] == "note: --temperature, --top-k: no effect without sampling"


def test_help_lists_every_option(run):
    code, out, _ = run("--help", model=None)
    assert code == 0
    for flag in (
        "--prompt", "--prompts-file", "--model", "--preset", "--tokenizer", "--max-new-tokens",
        "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed",
        "--no-repeat-ngram-size", "--greedy", "--do-sample", "--num-samples", "--num-beams",
        "--length-penalty", "--stop", "--eos-token-id", "--window", "--device", "--dtype",
        "--backend", "--json", "--stats", "--interactive", "--save", "--logprobs",
        "--progress",
    ):  # fmt: skip
        assert flag in out


# Log-probabilities


def teacher_forced(model_dir, tokens):
    """log_softmax of transformers' raw logits: row t is what is said of token t + 1."""
    model = transformers.GPT2LMHeadModel.from_pretrained(model_dir)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


@pytest.mark.parametrize(
    "flags",
    [
        ["--greedy"],
        ["--seed", "1", "--temperature", "2", "--top-k", "5"],
        ["--seed", "1", "--repetition-penalty", "3", "--num-samples", "2"],
        ["--num-beams", "3", "--num-samples", "2"],
        ["--backend", "reference", "--greedy"],
    ],
    ids=" ".join,
)
def test_logprobs_are_those_of_raw_logits(run, generator, model_dir, flags):
    options = [PROMPT, "--max-new-tokens", 8, *flags]
    code, out, _ = run(*options, "--logprobs", 3, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, bool(lines)) == (0, True)
    prompt = generator.tokenizer.encode(PROMPT)
    tables = []
    for line in lines:
        assert len(line["logprobs"]) == len(line["top_logprobs"]) == 8
        expected = teacher_forced(model_dir, prompt + line["tokens"])[len(prompt) - 1 :]
        rows = []
        for place, token in enumerate(line["tokens"]):
            found, top = line["logprobs"][place], line["top_logprobs"][place]
            assert found == pytest.approx(expected[place, token].item(), abs=1e-4)
            best = expected[place].topk(3)
            assert [one["id"] for one in top] == best.indices.tolist()
            assert [one["logprob"] for one in top] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert [one["text"] for one in top] == [
                generator.tokenizer.decode([one["id"]]) for one in top
            ]
            rows.append([f"{found:.6f}", str(token)])
        tables.append(rows)
        assert "prompt_logprobs" not in line
    # The text is what it is without, and below it each token has a line.
    code, text, _ = run(*options, "--logprobs", 0)
    plain = run(*options)[1].split("---\n")
    for found, expected, rows in zip(text.split("---\n"), plain, tables, strict=True):
        assert found.startswith(expected)
        _, *table = found.removeprefix(expected).splitlines()
        assert [line.split()[:2] for line in table] == rows
    line = json.loads(run(*options, "--logprobs", 0, "--json")[1].splitlines()[0])
    assert line["logprobs"] == lines[0]["logprobs"]
    assert "top_logprobs" not in line


def test_no_new_tokens_and_logprobs_score_the_prompts(run, generator, model_dir, tmp_path):
    file = tmp_path / "prompts.txt"
    prompts = [PROMPT, "", TEXT[:60], "The"]
    file.write_text("\n".join(prompts))
    flags = ["--prompts-file", file, "--max-new-tokens", 0, "--logprobs"]
    lines = [json.loads(line) for line in run(*flags, 2, "--json")[1].splitlines()]
    for prompt, line in zip(prompts, lines, strict=True):
        tokens = line["prompt_token_ids"]
        assert tokens == (generator.tokenizer.encode(prompt) or [generator.tokenizer.eos_token_id])
        expected = teacher_forced(model_dir, tokens)
        assert line["prompt_logprobs"][0] is line["prompt_top_logprobs"][0] is None
        places = range(len(tokens) - 1)
        wanted = expected[places, tokens[1:]].tolist()
        assert line["prompt_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)
        for place in places:
            top = line["prompt_top_logprobs"][place + 1]
            assert [one["id"] for one in top] == expected[place].topk(2).indices.tolist()
        assert (line["text"], line["tokens"], line["logprobs"]) == ("", [], [])
    code, text, _ = run(*flags, 0)
    assert code == 0
    for part, line in zip(text.split("---\n"), lines, strict=True):
        assert part.startswith(line["prompt"] + "\n")
        values = [row.split()[0] for row in part.removeprefix(line["prompt"]).splitlines()[2:]]
        expected = [f"{x:.6f}" for x in line["prompt_logprobs"][1:]]
        assert values == ["none", *expected]


def test_logprobs_that_cannot_be_given_are_refused(run):
    assert_one_error(run(PROMPT, "--logprobs", -1), 2, "--logprobs is -1")
    assert_one_error(run(PROMPT, "--logprobs", 299), 2, "--logprobs is 299", "298 tokens")
    assert run(PROMPT, "--logprobs", 298, "--max-new-tokens", 1)[0] == 0
    assert_one_error(run("--interactive", "--logprobs", 0), 2, "--logprobs does not go")
    long = run(TEXT * 5, "--logprobs", 0, "--max-new-tokens", 0)
    assert_one_error(long, 1, "n_positions=64", "perplexity")


# How far it is, and what there is to say


def test_progress_counts_on_standard_error(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n" * 40)
    for flags in (["--json"], [], ["--num-samples", 2], ["--num-beams", 2]):
        options = ["--prompts-file", file, "--max-new-tokens", 3, "--seed", 1, *flags]
        code, out, err = run(*options, "--progress")
        assert (code, out) == run(*options)[:2]
        *notes, line = err.splitlines()
        assert re.fullmatch(r"(\d+)/\1 done, [\d,]+\.\d tok/s, 0:00 left", line), err
        assert line.startswith("80/" if "--num-samples" in flags else "40/")
        assert run(*options)[2].splitlines() == notes
    assert_one_error(run(PROMPT, "--progress"), 2, "--progress is for --prompts-file")


def test_progress_counts_prompts_that_are_scored_and_a_single_one(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(PROMPT)
    for tokens in (0, 5):
        flags = ["--prompts-file", file, "--max-new-tokens", tokens, "--logprobs", 0, "--progress"]
        code, out, err = run(*flags)
        assert code == 0
        assert out.startswith(PROMPT)
        assert err.startswith("1/1 done")


def test_the_time_left_is_that_of_the_tokens_left(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(prompt_progress.time, "monotonic", lambda: now[0])
    progress = prompt_progress.PromptProgress([11, 11, 21, 21])
    progress.add_prefill(1.0, [[1], [1]])
    for _ in range(10):
        now[0] += 1
        progress.add_step(1.0, 2, 1)
    # 20 tokens in 10 s, and 44 of 64 may still come.
    assert progress._text() == "0/4 done, 2.0 tok/s, 0:22 left"
    ended = Generation("", "", list(range(11)), 1, "length", None)
    progress.add_result(ended)
    progress.add_result(ended)
    now[0] += 1
    assert progress._text() == "2/4 done, 2.0 tok/s, 0:21 left"


def test_progress_is_written_over_on_a_terminal_and_never_within_a_result(model_dir, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n" * 70)
    terminal = Terminal(
        command(model_dir, "--prompts-file", str(file), "--max-new-tokens", "40", "--progress")
    )
    screen = terminal.wait_for(b"70/70 done") + terminal.wait_for(b"left")
    assert terminal.process.wait(60) == 0
    assert b"\r\x1b[K0/70 done" in screen
    # Once the line is taken off, what is left are whole results.
    kept = re.sub(rb"\r\x1b\[K[^\r\n\x1b]*(?=\r\x1b\[K)", b"", screen).replace(b"\r\x1b[K", b"")
    texts = kept.split(b"---\r\n")
    assert len(texts) == 70
    assert all(text.startswith(PROMPT.encode()) for text in texts)
    assert b"tok/s" not in b"".join(texts[:-1])


def test_notes_come_before_or_after_a_streamed_text(model_dir):
    arguments = command(model_dir, PROMPT, "--max-new-tokens", "150", "--eos-token-id", "none")
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENVIRONMENT, check=True
    )
    text, note, rest = done.stdout.partition(b"\nnote: ")
    assert text.startswith(PROMPT.encode())
    assert note
    assert rest.startswith(b"the text is longer than the model's 64 positions")
    assert rest.count(b"\n") == 1


def test_notes_of_the_library_come_before_a_streamed_text(model_dir, monkeypatch, capfd):
    """Kernels that are looked for at the first step, say."""
    decode = generator_module.decode

    def noisy(*arguments, **options):
        logging.getLogger("gpt2fast.kernels.library").warning("something about kernels")
        yield from decode(*arguments, **options)

    monkeypatch.setattr(generator_module, "decode", noisy)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    assert main(["--model", str(model_dir), PROMPT, "--max-new-tokens", "5"]) == 0
    assert capfd.readouterr().out.startswith(f"gpt2fast: something about kernels\n{PROMPT}")


def test_as_a_library_nothing_is_printed(model_dir):
    script = (
        "from gpt2fast import Generator\n"
        f"generator = Generator.from_pretrained({str(model_dir)!r}, window='slide')\n"
        "generator('The cat', max_new_tokens=10)\n"
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    generator('The cat', max_new_tokens=100, eos_token_id=None)\n"
        "assert 'newest 32 tokens' in str(told[0].message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=ENVIRONMENT, check=True
    )
    assert (done.stdout, done.stderr) == (b"", b"")


# Saving


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        ([], []),
        (["--dtype", "bfloat16"], ["--dtype", "bfloat16"]),
        (["--dtype", "float64"], []),
        (["--quantize", "int8"], []),
        (["--quantize", "int8", "--dtype", "bfloat16"], []),
        (["--quantize", "int4"], []),
        (["--backend", "reference"], ["--backend", "reference"]),
    ],
    ids=" ".join,
)
def test_a_saved_model_writes_the_same_text(run, tmp_path, flags, again):
    options = [PROMPT, "--seed", 3, "--max-new-tokens", 40, "--json"]
    folder = tmp_path / "new" / "model"
    code, out, err = run(*options, *flags, "--save", folder)
    assert code == 0
    assert f"note: the model is saved in {folder}" in err
    assert out == run(*options, *again, model=folder)[1]
    assert out == run(*options, *flags)[1]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_saving_keeps_the_tokenizer_and_what_the_checkpoint_says_of_generating(
    run, model_dir, tmp_path
):
    source = tmp_path / "source"
    shutil.copytree(model_dir, source)
    ends = {"eos_token_id": [7, 11], "pad_token_id": 3, "max_length": 33}
    (source / "generation_config.json").write_text(json.dumps(ends))
    for flags in ([], ["--quantize", "int8"]):
        folder = tmp_path / f"saved{len(flags)}"
        assert run("--save", folder, *flags, model=source)[0] == 0
        kept = json.loads((folder / "generation_config.json").read_text())
        assert {name: kept[name] for name in ends} == ends
        for name in ("tokenizer.json", "vocab.json", "merges.txt"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
        assert loaded(TEXT)["input_ids"] == Tokenizer.from_pretrained(source).encode(TEXT)


def test_saving_merges_adapters(run, generator, model_dir, tmp_path):
    model = GPT2.from_pretrained(model_dir)
    add_adapters(model, rank=2)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path / "adapter", base_model=str(model_dir))
    options = [PROMPT, "--greedy", "--max-new-tokens", 20]
    adapted = run(*options, "--adapter", tmp_path / "adapter")
    assert adapted[1] != run(*options)[1]
    assert run("--adapter", tmp_path / "adapter", "--save", tmp_path / "merged")[0] == 0
    assert run(*options, model=tmp_path / "merged") == adapted
    assert transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged")


def test_saving_needs_no_prompt_and_reads_none(run, tmp_path):
    code, out, err = run("--save", tmp_path / "model", stdin="not a prompt")
    assert (code, out) == (0, "")
    assert err == f"note: the model is saved in {tmp_path / 'model'}\n"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("--save", empty)[0] == 0
    assert (empty / "config.json").is_file()


def test_saving_replaces_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Generator, "from_pretrained", None
    )  # all of it is said before a model loads
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "my.txt").write_text("mine")
    assert_one_error(run("--save", tmp_path / "full"), 1, "full", "my.txt", "new folder")
    (tmp_path / "file").write_text("mine")
    assert_one_error(run("--save", tmp_path / "file"), 1, "no folder")
    assert_one_error(run("--save="), 2, "--save is empty")
    monkeypatch.chdir(tmp_path / "full")
    (tmp_path / "full" / "my.txt").unlink()
    assert_one_error(run("--save", "."), 1, "current folder")


def test_saving_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpt2fast.checkpoints.gpt2.atomic_write_text", fail)
    result = run("--save", tmp_path / "model", PROMPT)
    assert_one_error(result, 1, "--save", "No space left")
    assert list(tmp_path.iterdir()) == []


# A conversation


def converse(run, *lines, flags=()):
    flags = ["--interactive", "--seed", 2, "--max-new-tokens", 12, *flags]
    return run(*flags, stdin="".join(line + "\n" for line in lines))


def answer(generator, text, seed=2, **options):
    return generator(text, **{"seed": seed, "max_new_tokens": 12, **options}).text


def test_a_conversation_is_one_growing_text(run, generator):
    code, out, _err = converse(run, "The cat", "The dog", "")
    first = answer(generator, "The cat")
    second = answer(generator, f"The cat{first}\nThe dog", seed=3)
    third = answer(generator, f"The cat{first}\nThe dog{second}", seed=4)
    assert code == 0
    assert out == f"{first}\n{second}\n{third}\n"


def test_a_conversation_may_begin_with_the_prompt(run, generator):
    for flags in (["The cat"], ["--prompt", "The cat"]):
        assert converse(run, flags=flags)[1] == f"The cat{answer(generator, 'The cat')}\n"


def test_reset_forgets_and_set_changes(run, generator):
    code, out, err = converse(run, "The cat", "/reset", "/set top-k 1", "The dog")
    assert code == 0
    assert out.splitlines()[-1] == answer(generator, "The dog", seed=3, top_k=1)
    code, out, err = converse(run, "/set temperature none", "/set max_new_tokens 5", "/set", "The")
    assert out == answer(generator, "The", temperature=None, max_new_tokens=5) + "\n"
    assert "  temperature none\n" in err
    assert "  max_new_tokens 5\n" in err


def test_save_writes_the_text(run, generator, tmp_path):
    file = tmp_path / "story.txt"
    code, _, err = converse(run, "The cat", f"/save {file}", "/quit", "never read")
    assert code == 0
    assert file.read_text(encoding="utf-8") == "The cat" + answer(generator, "The cat")
    assert str(file) in err


def test_mistakes_do_not_end_a_conversation(run, generator, tmp_path):
    mistakes = {
        "/set temperature nan": "temperature is nan",
        "/set temperature": "takes a number",
        "/set top_k 1.5": "whole number",
        "/set colour 3": "colour",
        "/jump": "/jump",
        "/save": "file name",
        f"/save {tmp_path}/no/where.txt": "where.txt",
    }
    code, out, err = converse(run, *mistakes, "/help", "The cat")
    assert code == 0
    assert out == answer(generator, "The cat") + "\n"
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    for line, part in zip(errors, mistakes.values(), strict=True):
        assert part in line
    for command in ("/set", "/reset", "/save", "/quit"):
        assert command in err


def test_a_text_that_is_too_long_does_not_end_a_conversation(run, generator):
    code, out, err = converse(run, TEXT * 5, "/reset", "The cat", flags=["--window", "error"])
    assert code == 0
    assert out == answer(generator, "The cat", seed=3) + "\n"
    assert "n_positions=64" in err


# As separate processes


def command(model_dir, *arguments):
    return [sys.executable, "-m", "gpt2fast.generate", "--model", str(model_dir), *arguments]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
ENDLESS = ["--max-new-tokens", "1000000", "--eos-token-id", "none", "--seed", "1"]


def test_a_reader_that_has_enough_ends_it_quietly(model_dir):
    process = subprocess.Popen(
        command(model_dir, PROMPT, *ENDLESS),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout.read(40).startswith(PROMPT.encode())
    process.stdout.close()
    assert process.wait(60) == 0
    # The window's note may come before the reader leaves.
    assert all(line.startswith(b"note: ") for line in process.stderr.read().splitlines())


def test_interrupting_ends_it_with_code_130_and_no_traceback(model_dir):
    process = subprocess.Popen(
        command(model_dir, PROMPT, *ENDLESS),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_generating_imports_no_heavy_module(model_dir):
    script = (
        "import sys; from gpt2fast.generate import main; "
        f"main(['--model', {str(model_dir)!r}, 'The cat', '--max-new-tokens', '3']); "
        "print(*sys.modules, file=sys.stderr)"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, env=ENVIRONMENT, check=True
    )
    loaded = process.stderr.decode().split()
    for name in (
        "transformers", "tokenizers", "huggingface_hub", "jsonargparse", "rich", "yaml",
        "torch._dynamo", "torch._inductor", "sympy",
    ):  # fmt: skip
        assert name not in loaded


@pytest.mark.skipif(sys.platform != "linux", reason="needs a shell and /dev/full")
@pytest.mark.parametrize(
    ("redirection", "flags", "code", "out", "err"),
    [
        (">&-", [], 1, b"", b"error: standard output is closed"),
        (">/dev/full", [], 1, b"", b"error: reading or writing failed: [Errno 28]"),
        (">/dev/full <&-", ["--interactive"], 1, b"", b"error: reading or writing failed"),
        ("<&-", ["--interactive"], 0, PROMPT.encode(), b""),
        ("2>&-", ["--window", "slide", "--eos-token-id", "none"], 0, PROMPT.encode(), b""),
    ],
)
def test_closed_descriptors_and_full_disks(model_dir, redirection, flags, code, out, err):
    arguments = command(model_dir, PROMPT, "--max-new-tokens", "100", *flags)
    process = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *arguments],
        capture_output=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.returncode == code, process.stderr
    assert process.stdout.startswith(out)
    assert bool(process.stdout) == bool(out)
    assert b"note:" not in process.stdout
    lines = [x for x in process.stderr.splitlines() if not x.startswith(b"note: ")]
    assert len(lines) == bool(err)
    assert all(line.startswith(err) for line in lines)


def test_interrupting_an_import_leaves_no_traceback(model_dir):
    for module in (b" torch.version\n", b" torch._ops\n"):
        process = subprocess.Popen(
            command(model_dir, PROMPT, *ENDLESS), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**ENVIRONMENT, "PYTHONPROFILEIMPORTTIME": "1"},
        )  # fmt: skip
        # It reports each import as it ends.
        assert any(line.endswith(module) for line in process.stderr), module
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert b"Traceback" not in process.communicate(timeout=60)[1]
        assert process.returncode == 130


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, arguments):
        import pty

        self.screen = b""
        self._main, side = pty.openpty()
        self.process = subprocess.Popen(
            arguments, stdin=side, stdout=side, stderr=side, env=ENVIRONMENT, start_new_session=True
        )
        os.close(side)

    def wait_for(self, text, seconds=60):
        """Read until the text appears on the screen; returns all that came up to it."""
        end = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < end, self.screen
            if select.select([self._main], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self._main, 4096)
                except OSError as error:  # Linux reports the end of a terminal so
                    assert error.errno == errno.EIO
                    assert text in self.screen
        before, _, self.screen = self.screen.partition(text)
        return before + text

    def wait_for_more(self, count):
        """Read until so many bytes have come; they stay on the screen."""
        end = time.monotonic() + 60
        while len(self.screen) < count:
            assert time.monotonic() < end, self.screen
            if select.select([self._main], [], [], 0.1)[0]:
                self.screen += os.read(self._main, 4096)

    def type(self, text):
        os.write(self._main, text)

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_conversation_survives_ctrl_c(model_dir):
    terminal = Terminal(command(model_dir, "--interactive", *ENDLESS))
    terminal.wait_for(b"> ")
    terminal.type(b"The cat\n")
    terminal.wait_for(b"The cat\r\n")
    terminal.wait_for_more(1000)  # the window has slid, so the answer is on its way
    terminal.interrupt()
    # What there is to say comes after the answer, on a line of its own.
    assert b"note: " not in terminal.wait_for(b"\r\nnote: ")[:-8]
    terminal.wait_for(b"\r\n> ")
    # Just after it has written the prompt, readline overlooks a signal until the next key.
    time.sleep(0.5)
    terminal.interrupt()
    terminal.wait_for(b"/quit leaves)")
    terminal.wait_for(b"\r\n> ")
    terminal.type(b"/set max_new_tokens 3\n")
    terminal.wait_for(b"> ")
    terminal.type(b"\x1b[A")  # the arrow up brings the line back
    terminal.wait_for(b"/set max_new_tokens 3")
    terminal.type(b"\n")
    terminal.wait_for(b"> ")
    terminal.type(b"\x04")
    assert terminal.process.wait(60) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_text_streams_on_a_terminal(model_dir):
    terminal = Terminal(command(model_dir, PROMPT, *ENDLESS))
    terminal.wait_for(PROMPT.encode())
    terminal.wait_for_more(1000)  # the window slides after 60 tokens
    assert terminal.process.poll() is None
    terminal.interrupt()
    assert b"note: " not in terminal.wait_for(b"\r\nnote: ")[:-8]
    assert terminal.process.wait(60) == 130


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_without_a_prompt_a_terminal_gets_a_hint(model_dir):
    terminal = Terminal(command(model_dir))
    assert b"error: there is no prompt" in terminal.wait_for(b"--help")
    assert terminal.process.wait(60) == 2
