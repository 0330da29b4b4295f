"""Files of prompts, and the progress through them."""

from __future__ import annotations

import json
import re

import pytest
import torch

from generate_command import PROMPT, Terminal, assert_one_error, command
from gpt2fast.cli import prompt_progress
from gpt2fast.inference.continuation import Generation
from time_limits import patience


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
        {"prompt": PROMPT, "id": 7, "seed": 5, "top_k": 9, "repetition_penalty": 1.5},
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


def test_lines_have_lengths_biases_and_bad_words_of_their_own(run, generator, tmp_path):
    own = [
        {"max_length": 20},
        {"max_new_tokens": 4},
        {"bad_words": ["e"], "bad_words_ids": [[270], [41, 42]]},
        {"logit_bias": {"40": 12, "50": 9.5}, "frequency_penalty": 1.5, "presence_penalty": 1},
        {"penalty_alpha": 0.6, "top_k": 3},
        {"epsilon_cutoff": 0.04, "eta_cutoff": 0.1, "min_new_tokens": 9, "max_new_tokens": 9},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": PROMPT, **options}) for options in own))
    flags = ["--prompts-file", file, "--temperature", 0, "--bad-words", "a", "--json"]
    code, out, _ = run(*flags, "--max-length", 30)
    assert code == 0
    results = [json.loads(line) for line in out.splitlines()]
    for options, result in zip(own, results, strict=True):
        shared = {"temperature": 0, "max_length": 30, "max_new_tokens": None, "bad_words": "a"}
        if "max_new_tokens" in options:
            shared["max_length"] = None
        assert result["tokens"] == generator(PROMPT, **{**shared, **options}).tokens
    assert len({tuple(result["tokens"][:9]) for result in results}) > 3
    code, out, err = run(*flags, "--max-new-tokens", 8, "--progress")
    assert code == 0
    assert err.splitlines()[-1].startswith("6/6 done")
    assert [json.loads(line)["new_tokens"] for line in out.splitlines()][1:] == [4, 8, 8, 8, 9]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"max_tokens": 3}, "'max_tokens'"),
        ({"max_new_tokens": "3"}, "max_new_tokens is '3'"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": True}, "top_p is True"),
        ({"min_p": 2}, "min_p is 2"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"stop": 3}, "stop is 3"),
        ({"stop": [""]}, "stop is ['']"),
        ({"bad_words": 3}, "bad_words is 3"),
        ({"bad_words_ids": [3]}, "bad_words_ids has the item 3"),
        ({"logit_bias": {"3": 101}}, "logit_bias of the token 3 is 101"),
        ({"logit_bias": {"x": 1}}, "logit_bias has the key 'x'"),
        ({"max_length": 9, "max_new_tokens": 3}, "max_new_tokens is 3 and max_length"),
        ({"min_new_tokens": 900}, "min_new_tokens is 900"),
        ({"max_time": -1}, "max_time is -1"),
        ({"frequency_penalty": 5}, "frequency_penalty is 5"),
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
    assert terminal.process.wait(patience()) == 0
    assert b"\r\x1b[K0/70 done" in screen
    # Once the line is taken off, what is left are whole results.
    kept = re.sub(rb"\r\x1b\[K[^\r\n\x1b]*(?=\r\x1b\[K)", b"", screen).replace(b"\r\x1b[K", b"")
    texts = kept.split(b"---\r\n")
    assert len(texts) == 70
    assert all(text.startswith(PROMPT.encode()) for text in texts)
    assert b"tok/s" not in b"".join(texts[:-1])
