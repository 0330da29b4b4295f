"""`gpt2fast generate` with --json-schema, --regex, --grammar and --choice."""

from __future__ import annotations

import json
import re
import sys

import jsonschema
import pytest

from generate_command import PROMPT, assert_one_error
from gpt2fast.inference.grammar import Grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"enum": ["x", "y"]},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
}
LARK = 'start: "[" WORD "]"\nWORD: /[a-z]{2,4}/\n'
GBNF = 'root ::= "[" [a-z]{2,4} "]"\n'


@pytest.fixture
def files(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "lark.txt").write_text(LARK)
    (tmp_path / "words.gbnf").write_text(GBNF)
    return tmp_path


def continuation(result) -> str:
    code, out, err = result
    assert (code, err) == (0, "")
    assert out.startswith(PROMPT) and out.endswith("\n")
    return out.removeprefix(PROMPT).removesuffix("\n")


@pytest.mark.parametrize("seed", range(3))
def test_the_text_has_the_form_that_is_asked_for(run, files, seed):
    base = [PROMPT, "--seed", seed, "--max-new-tokens", 50]
    jsonschema.validate(
        json.loads(continuation(run(*base, "--json-schema", files / "schema.json"))), SCHEMA
    )
    assert re.fullmatch("[A-C]{3}-[0-9]", continuation(run(*base, "--regex", "[A-C]{3}-[0-9]")))
    for name in ("lark.txt", "words.gbnf"):
        assert re.fullmatch(r"\[[a-z]{2,4}\]", continuation(run(*base, "--grammar", files / name)))
    assert continuation(run(*base, "--choice", "yes", "--choice", "no")) in ("yes", "no")
    greedy = run(PROMPT, "--greedy", "--json_schema", files / "schema.json")
    jsonschema.validate(json.loads(continuation(greedy)), SCHEMA)


def test_the_text_is_that_of_the_library(run, generator):
    grammar = Grammar.regex("[a-z ]{20}", generator.tokenizer)
    expected = generator(PROMPT, grammar=grammar, seed=3, max_new_tokens=40)
    found = continuation(run(PROMPT, "--regex", "[a-z ]{20}", "--seed", 3, "--max-new-tokens", 40))
    assert found == expected.text


def test_every_way_of_writing_takes_a_form(run, tmp_path):
    flags = ["--choice", "yes", "--choice", "no", "--seed", 1]
    code, out, _ = run(PROMPT, *flags, "--json", "--num-samples", 3)
    results = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(results) == 3
    assert all(
        (r["text"], r["finish_reason"]) in {("yes", "stop"), ("no", "stop")} for r in results
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("It was\nThe\n")
    code, out, _ = run("--prompts-file", prompts, "--json", *flags)
    assert code == 0 and all(json.loads(x)["text"] in ("yes", "no") for x in out.splitlines())
    code, out, _ = run("--interactive", *flags, stdin="It was\n")
    assert code == 0 and re.search(r"\b(yes|no)\b", out)


def test_a_job_goes_on_with_its_form_alone(run, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text("".join(json.dumps(text) + "\n" for text in ("It was", "The", "A")))
    job = ["--prompts-file", prompts, "--out", out, "--seed", 1, "--regex"]
    assert run(*job, "yes|no")[0] == 0
    lines = out.read_text().splitlines(keepends=True)
    assert [json.loads(line)["text"] in ("yes", "no") for line in lines] == [True] * 3
    out.write_text(lines[0])
    assert run(*job, "yes|no")[0] == 0
    assert out.read_text().splitlines(keepends=True) == lines
    code, _, err = run(*job, "yes|no|maybe")
    assert code == 1 and "grammar" in err


def test_every_mistake_is_one_line_and_exit_code_2(run, tmp_path, files):
    (tmp_path / "bad.json").write_text('{"type": "strng"}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "bad.lark").write_text("start: missing")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "large.json").write_text(" " * 200_000)
    mistakes = [
        (["--json-schema", tmp_path / "bad.json"], "--json-schema", "bad.json", "strng"),
        (["--json-schema", tmp_path / "broken.json"], "--json-schema", "not valid JSON"),
        (["--json-schema", tmp_path / "none.json"], "none.json"),
        (["--json-schema", tmp_path / "large.json"], "large.json", "131072"),
        (["--json-schema", tmp_path], str(tmp_path)),
        (["--grammar", tmp_path / "bad.lark"], "--grammar", "unknown name"),
        (["--grammar", tmp_path / "bytes"], "bytes"),
        (["--regex", "("], "--regex", "unclosed group"),
        (["--regex", ""], "--regex is empty"),
        (["--choice", ""], "--choice", "at least one character"),
        (["--choice", "a", "--num-beams", 2], "--choice and --num-beams"),
        (["--choice", "a", "--regex", "b"], "--regex", "--choice"),
        (["--grammar", ""], "--grammar is empty"),
    ]
    for flags, *parts in mistakes:
        assert_one_error(run(PROMPT, *flags), 2, *map(str, parts))


def test_options_that_leave_no_token_fail(run):
    result = run(PROMPT, "--choice", "aaaa", "--bad-words", "a", "--seed", 1)
    assert result[0] == 1 and "that the grammar allows" in result[2]


def test_a_missing_library_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert_one_error(run(PROMPT, "--choice", "a"), 2, 'pip install "gpt2fast[serve]"')
