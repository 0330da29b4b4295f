"""`--speculate`: the same text, and what it takes."""

from __future__ import annotations

import json

import pytest

from generate_command import PROMPT, TEXT, assert_one_error
from gpt2fast import GPT2
from gpt2fast.inference.speculation import LookupDrafter, ModelDrafter
from small_generators import small_model


@pytest.fixture
def proposals(monkeypatch):
    """Counts what is asked of drafters."""
    asked = []
    for drafter in (LookupDrafter, ModelDrafter):
        real = drafter.propose

        def propose(self, rows, real=real):
            asked.append(type(self))
            return real(self, rows)

        monkeypatch.setattr(drafter, "propose", propose)
    return asked


@pytest.mark.parametrize("output", [[], ["--json"], ["--stats"]])
def test_the_text_is_the_same(run, model_dir, proposals, output):
    for flags in (["--greedy"], ["--seed", 3, "--top-k", 5]):
        options = [TEXT[:20] * 2, "--max-new-tokens", 20, *flags, *output]
        code, plain, _ = run(*options)
        assert code == 0 and not proposals
        for speculate, drafter in (("lookup", LookupDrafter), (str(model_dir), ModelDrafter)):
            code, out, _ = run(*options, "--speculate", speculate)
            assert (code, out) == (0, plain)
            assert set(proposals) == {drafter}
            proposals.clear()
        assert run(*options, "--speculate", "off")[:2] == (0, plain)
        assert not proposals


def test_many_prompts_speculate_too(run, tmp_path, proposals):
    file, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    file.write_text(f"{PROMPT}\nthe cat the cat the cat\n" * 20)
    flags = ["--prompts-file", file, "--seed", 3, "--max-new-tokens", 20]
    code, plain, _ = run(*flags, "--json")
    assert code == 0
    assert run(*flags, "--out", out, "--speculate", "lookup")[0] == 0
    assert proposals
    assert [json.loads(line) for line in plain.splitlines()] == [
        json.loads(line) for line in out.read_text().splitlines()
    ]
    # How tokens were found is no part of the job.
    assert run(*flags, "--out", out, "--speculate", "off")[0] == 0


def test_a_conversation_speculates(run, proposals):
    flags = ["--interactive", "--greedy", "--max-new-tokens", 9]
    plain = run(*flags, stdin=f"{PROMPT}\n")
    assert run(*flags, "--speculate", "lookup", stdin=f"{PROMPT}\n") == plain
    assert proposals


def test_what_cannot_draft_is_refused(run, tmp_path, model_dir):
    assert_one_error(
        run(PROMPT, "--speculate", "no/such/model"), 1, 'neither "off" nor "lookup"', "no/such"
    )
    assert_one_error(run(PROMPT, "--speculate", ""), 2, "--speculate is empty")
    small_model(vocab_size=2048).save_pretrained(tmp_path / "other")
    assert_one_error(run(PROMPT, "--speculate", tmp_path / "other"), 1, "tokenizer")
    # The bundled model has another vocabulary than the small one here.
    assert_one_error(
        run(PROMPT, "--speculate", "adventures"), 1, "not the model's", "same vocabulary"
    )
    assert GPT2.from_pretrained(model_dir).config.vocab_size != 2048


def test_where_nothing_is_guessed_a_note_says_so(run, proposals):
    options = [PROMPT, "--max-new-tokens", 5, "--speculate", "lookup"]
    _, _, said = run(*options, "--num-beams", 2)
    assert "note: --speculate lookup: no effect on beam search" in said
    _, _, said = run(*options, "--backend", "reference")
    assert "no effect where the weights are not packed" in said
    assert not proposals
