"""`gpt2fast generate`: flags, and every way to fail."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from generate_command import ENVIRONMENT, PROMPT, TEXT, assert_one_error, command
from gpt2fast import backend, config
from gpt2fast.checkpoints import hub
from gpt2fast.cli import sampling_flags
from gpt2fast.inference.generator import Generator
from gpt2fast.ops.backend import requested_backend
from gpt2fast.sampling import PROCESSORS, STEPWISE
from gpt2fast.tokenizer import BPETokenizer
from time_limits import patience

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
        ("--typical-p 0.3", {"typical_p": 0.3}),
        ("--repetition-penalty 2.5", {"repetition_penalty": 2.5}),
        ("--no-repeat-ngram-size 1", {"no_repeat_ngram_size": 1}),
        ("--epsilon-cutoff 0.05", {"epsilon_cutoff": 0.05}),
        ("--eta-cutoff 0.5", {"eta_cutoff": 0.5}),
        ("--frequency-penalty 1.5", {"frequency_penalty": 1.5}),
        ("--presence-penalty -2", {"presence_penalty": -2.0}),
        ("--penalty-alpha 0.6 --top-k 3", {"penalty_alpha": 0.6, "top_k": 3}),
        ("--logit-bias 40=9 --logit-bias 41=8.5", {"logit_bias": {40: 9, 41: 8.5}}),
        ("--bad-words e --bad-words a", {"bad_words": ["e", "a"]}),
        ("--max-length 20", {"max_new_tokens": None, "max_length": 20}),
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
    if "--max-length" in flags:
        base = base[:3]
    code, out, _ = run(*base, *flags.split())
    assert code == 0
    assert out == f"{generator(PROMPT, **{**DEFAULTS, **options})}\n"
    assert out != plain


def test_lengths_and_time_end_a_text_and_say_why(run, generator):
    base = [PROMPT, "--seed", 3, "--json"]
    tokens = generator(PROMPT, seed=3, max_new_tokens=40).tokens
    end = ["--eos-token-id", tokens[4]]
    late = json.loads(run(*base, *end, "--min-new-tokens", 12, "--max-new-tokens", 40)[1])
    assert late["new_tokens"] >= 12 and tokens[4] not in late["tokens"][:12]
    brief = json.loads(run(*base, "--max-time", 1e-9, "--eos-token-id", "none")[1])
    assert (brief["new_tokens"], brief["finish_reason"]) == (1, "time")
    short = json.loads(run(*base, "--max-length", 25, "--eos-token-id", "none")[1])
    assert short["prompt_tokens"] + short["new_tokens"] == 25
    assert short["finish_reason"] == "length"
    for beams in (1, 2):
        flags = ["--num-beams", beams, "--max-time", 1e-9, "--eos-token-id", "none"]
        flags += ["--max-new-tokens", 20]
        assert json.loads(run(PROMPT, "--json", *flags)[1])["finish_reason"] == "time"
    assert_one_error(run(PROMPT, "--max-length", 1), 1, "max_length", "max_new_tokens")


def test_bad_words_are_left_out_with_and_without_a_space(run, generator):
    flags = [PROMPT, "--greedy", "--max-new-tokens", 40, "--eos-token-id", "none"]
    plain = json.loads(run(*flags, "--json")[1])
    encode, decode = generator.tokenizer.encode, generator.tokenizer.decode
    texts = [decode([token]) for token in plain["tokens"]]
    word = next(text for text in texts if text.isalpha() and len(encode(text)) == 1)
    found = json.loads(run(*flags, "--json", "--bad-words", word)[1])
    for spelled in (encode(word), encode(" " + word)):
        places = range(len(found["tokens"]) - len(spelled) + 1)
        assert spelled not in [found["tokens"][p : p + len(spelled)] for p in places]
    assert found["text"] != plain["text"]


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


def test_the_bundled_model_is_the_default_and_says_so(run, model_dir, tmp_path, monkeypatch):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / hub.BUNDLED).symlink_to(model_dir)
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
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
        ("--penalty-alpha 0.6 --top-k 4 --greedy", ["--penalty-alpha", "--greedy"]),
        ("--penalty-alpha 0.6", ["--top-k is None", "at least 2"]),
        ("--window wide", ["--window", "wide"]),
        ("--dtype int8", ["--dtype", "int8"]),
        ("--prompt again", ["prompt", "twice"]),
        ("--interactive --json", ["--json", "--interactive"]),
        ("--interactive --num-beams 2", ["--num-beams", "--interactive"]),
        ("--tempurature 1", ["--tempurature"]),
        ("--max-length 20", ["--max-new-tokens is 9", "--max-length", "is 20", "leave one"]),
        ("--min-new-tokens 10", ["--min-new-tokens is 10", "--max-new-tokens (9)", "raise"]),
        ("--max-time 0", ["--max-time is 0.0", "above 0"]),
        ("--epsilon-cutoff 1", ["--epsilon-cutoff is 1.0", "below 1"]),
        ("--eta-cutoff x", ["--eta-cutoff", "x"]),
        ("--frequency-penalty 3", ["--frequency-penalty is 3.0", "from -2 to 2"]),
        ("--presence-penalty nan", ["--presence-penalty is nan", "from -2 to 2"]),
        ("--logit-bias 5", ["--logit-bias", "'5'", "50256=-100"]),
        ("--logit-bias 5=", ["--logit-bias", "'5='", "50256=-100"]),
        ("--logit-bias 5=101", ["--logit-bias of the token 5 is 101", "--bad-words"]),
        ("--logit-bias 99999=1", ["--logit-bias", "99999", "from 0 to 297"]),
        ("--bad-words=", ["--bad-words is empty", "at least one"]),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(run, flags, parts):
    assert_one_error(run(PROMPT, "--max-new-tokens", 9, *flags.split()), 2, *parts)


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

    # No model of a size that no machine has: what asks for too much here is a stand-in.
    monkeypatch.setattr(Generator, "stream", exhaust)
    assert_one_error(run(PROMPT), 1, "out of memory")


def test_samples_without_number_come_as_they_are_made(run, model_dir):
    flags = [PROMPT, "--seed", "0", "--max-new-tokens", "3", "--json"]
    with subprocess.Popen(
        command(model_dir, *flags, "--num-samples", str(10**8)),
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        text=True,
    ) as process:
        assert process.stdout is not None
        written = [process.stdout.readline() for _ in range(40)]
        process.stdout.close()
        assert process.wait(patience()) == 0
    assert [json.loads(line)["sample"] for line in written] == list(range(40))
    assert run(*flags, "--num-samples", 40)[1] == "".join(written)


def test_sampling_options_without_effect_are_noted(run):
    code, _, err = run(PROMPT, "--greedy", "--temperature", 2, "--top-k", 3)
    assert code == 0
    assert err.splitlines()[0] == "note: --temperature, --top-k: no effect without sampling"


def test_help_lists_every_option(run):
    code, out, _ = run("--help", model=None)
    assert code == 0
    for flag in (
        "--prompt", "--prompts-file", "--model", "--preset", "--tokenizer", "--max-new-tokens",
        *map(sampling_flags.flag, [*PROCESSORS, *STEPWISE]), "--seed", "--max-length",
        "--min-new-tokens", "--max-time", "--logit-bias", "--bad-words", "--greedy", "--do-sample",
        "--num-samples", "--num-beams",
        "--length-penalty", "--stop", "--eos-token-id", "--window", "--device", "--dtype",
        "--backend", "--json", "--stats", "--interactive", "--save", "--logprobs",
        "--progress",
    ):  # fmt: skip
        assert flag in out
