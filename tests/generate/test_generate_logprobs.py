"""--logprobs: against transformers' logits."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from generate_command import PROMPT, TEXT, assert_one_error


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
