"""`response_format`: answers that fit a schema, a regex, a grammar or a list."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2, 3]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


def write(client, form, **more):
    body = {"prompt": "the quick", "max_tokens": 60, "seed": 3, "response_format": form, **more}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def test_a_schema(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    for choice in write(client, form, n=4):
        value = json.loads(choice["text"])
        assert set(value) == {"ok", "n"} and value["n"] in (1, 2, 3)
        assert choice["finish_reason"] == "stop"


def test_a_regex_in_company_of_free_text(client):
    for choice in write(client, {"type": "regex", "regex": "[a-c]{3}-[0-9]{2}"}, n=3):
        assert re.fullmatch("[a-c]{3}-[0-9]{2}", choice["text"])


def test_a_choice(client):
    texts = {
        each["text"] for each in write(client, {"type": "choice", "choices": ["yes", "no"]}, n=8)
    }
    assert texts <= {"yes", "no"} and texts


@pytest.mark.parametrize("grammar", ['start: "ab" ("c" | "d")', 'root ::= "ab" ("c" | "d")'])
def test_a_grammar(client, grammar):
    (choice,) = write(client, {"type": "lark", "lark": grammar})
    assert choice["text"] in ("abc", "abd")


def test_in_a_conversation_and_in_pieces(client):
    body = {
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 60, "stream": True,
        "response_format": {"type": "choice", "choices": ["maybe not"]},
    }  # fmt: skip
    text = client.post("/v1/chat/completions", json=body).text
    parts = [json.loads(event[6:]) for event in text.split("\n\n")[:-2]]
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in parts) == "maybe not"


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}},
        {"type": "regex", "regex": "("},
        {"type": "lark", "lark": "start: nothing"},
        {"type": "choice", "choices": []},
        {"type": "regex", "regex": "a" * 70_000},
    ],
)
def test_what_is_no_format_is_refused(client, form):
    body = {"prompt": "a", "response_format": form}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("response_format")
