"""/v1/completions: the same texts and numbers as the library's, in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server_process import NAME, POSITIONS
from small_bpe import BPE, SIZE

PROMPT = "the quick brown fox"
GREEDY = {"temperature": 0, "max_tokens": 12}


def ask(client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def pieces(client, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, which ends as it should."""
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode("utf-8")
    events = text.split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1]) and not events[-1]
    assert events[-2] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def test_greedy_text_is_the_generators(client, generator):
    answer = ask(client, model=NAME, prompt=PROMPT, **GREEDY)
    alone = generator(PROMPT, do_sample=False, max_new_tokens=12)
    assert texts(answer) == [alone.text]
    assert answer["object"] == "text_completion" and answer["model"] == NAME
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == ("length" if alone.finish_reason == "length" else "stop")
    assert answer["usage"]["prompt_tokens"] == alone.prompt_tokens
    assert answer["usage"]["completion_tokens"] == alone.new_tokens


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.5},
    "presence_penalty": {"presence_penalty": -1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "epsilon_cutoff": {"epsilon_cutoff": 0.05},
    "eta_cutoff": {"eta_cutoff": 0.05},
    "logit_bias": {"logit_bias": {"65": 50, "66": 49.5}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_seed_gives_the_generators_samples(client, generator, options):
    answer = ask(client, prompt=PROMPT, max_tokens=10, seed=7, n=3, **options)
    plain = {"do_sample": True, "temperature": 1.0, "top_k": None, "top_p": None, **options}
    alone = generator(
        PROMPT, max_new_tokens=10, seed=7, num_return_sequences=3, eos_token_id=SIZE - 1, **plain
    )
    assert texts(answer) == [each.text for each in alone]
    assert len({*texts(answer)}) > 1
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]


def test_a_prompt_may_be_texts_or_tokens(client):
    both = [PROMPT, "a lazy dog"]
    expected = [texts(ask(client, prompt=each, **GREEDY))[0] for each in both]
    assert texts(ask(client, prompt=both, **GREEDY)) == expected
    assert texts(ask(client, prompt=BPE.encode(PROMPT), **GREEDY)) == expected[:1]
    assert texts(ask(client, prompt=[BPE.encode(each) for each in both], **GREEDY)) == expected


def test_choices_come_prompt_by_prompt(client):
    answer = ask(client, prompt=[PROMPT, "a lazy dog"], n=2, seed=1, max_tokens=5)
    first = ask(client, prompt=PROMPT, n=2, seed=1, max_tokens=5)
    assert texts(answer)[:2] == texts(first)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]


def test_an_empty_text_begins_with_the_end_token(client):
    empty = ask(client, prompt="", echo=True, logprobs=0, **GREEDY)
    token = ask(client, prompt=[SIZE - 1], **GREEDY)
    assert texts(empty) == texts(token)
    assert len(empty["choices"][0]["logprobs"]["tokens"]) == empty["usage"]["completion_tokens"]


def test_echo_with_logprobs_scores_the_prompt_as_the_generator_does(client, generator):
    answer = ask(client, prompt=PROMPT, echo=True, logprobs=3, max_tokens=0)
    (choice,) = answer["choices"]
    scores = choice["logprobs"]
    alone = generator(PROMPT, max_new_tokens=0, logprobs=True, top_logprobs=3)
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    assert scores["token_logprobs"][1:] == pytest.approx(alone.prompt_logprobs[1:], abs=1e-5)
    for place, token in enumerate(BPE.encode(PROMPT)):
        assert scores["tokens"][place] == BPE.decode([token])
        begin = scores["text_offset"][place]
        assert choice["text"][begin:].startswith(scores["tokens"][place])
    for named, alternatives, value in zip(
        scores["top_logprobs"][1:], alone.prompt_top_logprobs[1:], scores["token_logprobs"][1:],
        strict=True,
    ):  # fmt: skip
        assert 3 <= len(named) <= 4 and value in named.values()
        assert sorted(named.values(), reverse=True)[:3] == pytest.approx(
            list(alternatives.values()), abs=1e-5
        )


def test_echo_comes_before_the_continuation(client):
    plain = ask(client, prompt=PROMPT, logprobs=2, **GREEDY)["choices"][0]
    echoed = ask(client, prompt=PROMPT, echo=True, logprobs=2, **GREEDY)["choices"][0]
    assert echoed["text"] == PROMPT + plain["text"]
    count = len(plain["logprobs"]["tokens"])
    assert echoed["logprobs"]["tokens"][-count:] == plain["logprobs"]["tokens"]
    assert echoed["logprobs"]["token_logprobs"][-count:] == pytest.approx(
        plain["logprobs"]["token_logprobs"], abs=1e-5
    )
    for mine, other in zip(
        echoed["logprobs"]["top_logprobs"][-count:], plain["logprobs"]["top_logprobs"], strict=True
    ):
        assert mine == pytest.approx(other, abs=1e-5)
    assert echoed["logprobs"]["text_offset"][-count:] == [
        len(PROMPT) + offset for offset in plain["logprobs"]["text_offset"]
    ]


def test_logprobs_are_those_of_the_text_alone(client, generator):
    """Tokens of a stop text have none."""
    free = ask(client, prompt=PROMPT, max_tokens=30, seed=3, logprobs=0, ignore_eos=True)
    whole = free["choices"][0]
    assert whole["finish_reason"] == "length" and len(whole["logprobs"]["tokens"]) == 30
    stop = whole["text"][7:9]
    cut = ask(
        client, prompt=PROMPT, max_tokens=30, seed=3, logprobs=0, ignore_eos=True, stop=[stop]
    )["choices"][0]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    count = len(cut["logprobs"]["tokens"])
    assert cut["logprobs"]["tokens"] == whole["logprobs"]["tokens"][:count]
    assert all(offset < len(cut["text"]) for offset in cut["logprobs"]["text_offset"])
    assert whole["logprobs"]["text_offset"][count] >= len(cut["text"])


def test_stop_token_ids_end_a_text_and_are_left_out(client):
    free = ask(client, prompt=PROMPT, return_token_ids=True, ignore_eos=True, **GREEDY)["choices"][
        0
    ]
    token = free["token_ids"][4]
    first = free["token_ids"].index(token)
    cut = ask(
        client, prompt=PROMPT, return_token_ids=True, ignore_eos=True, stop_token_ids=[token],
        **GREEDY,
    )["choices"][0]  # fmt: skip
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", token)
    assert cut["token_ids"] == free["token_ids"][: first + 1]
    assert cut["text"] == BPE.decode(cut["token_ids"][:-1])
    later = ask(
        client, prompt=PROMPT, return_token_ids=True, ignore_eos=True, stop_token_ids=[token],
        min_tokens=12, **GREEDY,
    )["choices"][0]  # fmt: skip
    assert len(later["token_ids"]) == 12


def test_ignore_eos_goes_on_after_the_end_token(client):
    bias = {str(SIZE - 1): 100}
    ended = ask(client, prompt=PROMPT, logit_bias=bias, max_tokens=5)["choices"][0]
    assert (ended["text"], ended["finish_reason"], ended["stop_reason"]) == ("", "stop", None)
    on = ask(client, prompt=PROMPT, logit_bias=bias, max_tokens=5, ignore_eos=True)["choices"][0]
    assert on["finish_reason"] == "length"


def test_an_end_token_is_scored(client):
    """Harnesses ask for one new token and leave out the last of all, whatever it is."""
    bias = {str(SIZE - 1): 100}
    body = dict(prompt=PROMPT, logit_bias=bias, max_tokens=1, logprobs=1, echo=True)
    scores = ask(client, **body)["choices"][0]["logprobs"]
    assert len(scores["tokens"]) == len(BPE.encode(PROMPT)) + 1
    assert scores["tokens"][-1] == BPE.decode([SIZE - 1])


def test_best_of_gives_the_likeliest_by_token(client):
    body = dict(prompt=PROMPT, seed=5, max_tokens=8, logprobs=0, ignore_eos=True)
    every = ask(client, n=6, **body)
    best = ask(client, n=2, best_of=6, **body)
    means = [sum(c["logprobs"]["token_logprobs"]) / 8 for c in every["choices"]]
    order = sorted(range(6), key=lambda i: -means[i])
    assert texts(best) == [texts(every)[i] for i in order[:2]]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 48
    plain = ask(client, n=1, best_of=6, **{**body, "logprobs": None})
    assert texts(plain) == texts(best)[:1] and plain["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"echo": True}, {"stop": ["e", "th"]}])
def test_a_stream_is_the_whole_in_pieces(client, extra):
    body = dict(
        prompt=[PROMPT, "a lazy dog"], n=2, seed=11, max_tokens=40, ignore_eos=True,
        return_token_ids=True, **extra,
    )  # fmt: skip
    whole = ask(client, **body)
    found = pieces(client, stream_options={"include_usage": True}, **body)
    *parts, usage = found
    assert usage["choices"] == [] and all(part["usage"] is None for part in parts)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage["usage"][name] == whole["usage"][name]
    assert {part["id"] for part in found} == {usage["id"]}
    for choice in whole["choices"]:
        mine = [p["choices"][0] for p in parts if p["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert [id for part in mine for id in part["token_ids"]] == choice["token_ids"]
        assert [part["finish_reason"] for part in mine] == [None] * (len(mine) - 1) + [
            choice["finish_reason"]
        ]
        assert [p["prompt_token_ids"] for p in mine if "prompt_token_ids" in p] == [
            choice["prompt_token_ids"]
        ]
        if choice["logprobs"] is not None:
            for name, values in choice["logprobs"].items():
                assert [one for part in mine for one in part["logprobs"][name]] == values
    assert "�" in "".join(texts(whole)), "no token of half a character came up"


def test_characters_are_never_split(client):
    """Bytes of a character come as tokens of their own."""
    snowman = "☃".encode()
    ids = [BPE.encode(chr(byte))[0] if byte < 128 else None for byte in snowman]
    assert ids == [None] * 3
    tokens = [
        next(id for id in range(SIZE) if BPE.token_bytes()[id] == bytes([b])) for b in snowman
    ]
    found = ask(client, prompt=tokens, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert found["text"] == "☃"
    assert found["logprobs"]["tokens"] == ["bytes:\\xe2", "bytes:\\x98", "bytes:\\x83"]
    assert found["logprobs"]["text_offset"] == [0, 0, 0]


def test_without_max_tokens_there_are_sixteen_or_what_is_left(client):
    answer = ask(client, prompt=PROMPT, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16
    long = [5] * (POSITIONS - 3)
    assert ask(client, prompt=long, ignore_eos=True)["usage"]["completion_tokens"] == 3


def test_a_repeated_prompt_is_found_in_the_cache(client):
    body = dict(prompt=[7, 8, 9] * 30, **GREEDY)
    first, second = ask(client, **body), ask(client, **body)
    assert texts(first) == texts(second)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32


REFUSED = {
    "no prompt": ({}, "prompt", "prompt is missing"),
    "null prompt": ({"prompt": None}, "prompt", "prompt is null"),
    "prompt of numbers": ({"prompt": 5}, "prompt", "prompt is 5"),
    "mixed": ({"prompt": ["a", 5]}, "prompt[1]", "must be a text"),
    "id too large": ({"prompt": [1, SIZE]}, "prompt[1]", f"from 0 to {SIZE - 1}"),
    "id negative": ({"prompt": [-1]}, "prompt[0]", "prompt[0] is -1"),
    "id is true": ({"prompt": [1, True]}, "prompt[1]", "True"),
    "no ids": ({"prompt": [[]]}, "prompt[0]", "at least 1 token"),
    "nothing": ({"prompt": []}, "prompt", "prompt is []"),
    "surrogate": ({"prompt": "a\ud800"}, "prompt", "lone surrogate U+D800"),
    "too long": ({"prompt": [1] * (POSITIONS + 1)}, "prompt", f"{POSITIONS} are the most"),
    "text too long": ({"prompt": "x y " * 200}, "prompt", f"{POSITIONS} are the most"),
    "no room": ({"prompt": [1] * 100, "max_tokens": 40}, "prompt", "together 140"),
    "max_tokens": ({"prompt": "a", "max_tokens": 10**9}, "max_tokens", f"from 0 to {POSITIONS}"),
    "negative": ({"prompt": "a", "max_tokens": -1}, "max_tokens", "max_tokens is -1"),
    "fraction": ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "a whole number"),
    "text for a number": ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "'5'"),
    "n": ({"prompt": "a", "n": 10**9}, "n", "n is 1000000000"),
    "too many together": ({"prompt": ["a"] * 64, "n": 3}, "n", "192"),
    "best_of": ({"prompt": "a", "n": 3, "best_of": 2}, "best_of", "less than n (3)"),
    "best_of stream": ({"prompt": "a", "best_of": 2, "stream": True}, "best_of", "stream"),
    "min_tokens": ({"prompt": "a", "min_tokens": 9, "max_tokens": 5}, "min_tokens", "is 9"),
    "temperature": ({"prompt": "a", "temperature": -1}, "temperature", "temperature is -1"),
    "cold": ({"prompt": "a", "temperature": 1e-30}, "temperature", "1e-30"),
    "top_p": ({"prompt": "a", "top_p": 1.5}, "top_p", "at most 1"),
    "bias key": ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "'x'"),
    "bias value": ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", "101"),
    "bias id": ({"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias", "99999"),
    "logprobs": ({"prompt": "a", "logprobs": 21}, "logprobs", "max_logprobs"),
    "stop": ({"prompt": "a", "stop": [""]}, "stop[0]", "at least 1 character"),
    "stops": ({"prompt": "a", "stop": ["a"] * 17}, "stop", "17"),
    "suffix": ({"prompt": "a", "suffix": "b"}, "suffix", "cannot fill in"),
    "contrastive": ({"prompt": "a", "penalty_alpha": 0.6}, "penalty_alpha", "contrastive"),
    "unknown": ({"prompt": "a", "max_token": 5}, "max_token", "did you mean max_tokens?"),
    "stream_options": ({"prompt": "a", "stream_options": {}}, "stream_options", "stream"),
    "format": (
        {"prompt": "a", "response_format": {"type": "xml"}}, "response_format.type", "'xml'",
    ),
    "seed": ({"prompt": "a", "seed": -1}, "seed", "seed is -1"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "param", "words"), REFUSED.values(), ids=REFUSED)
def test_mistakes_are_named(client, body, param, words):
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/completions", content=content, headers=headers)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert words in error["message"] and len(error["message"]) < 400
    assert "Traceback" not in error["message"]


def test_another_model_is_not_found(client):
    answer = client.post("/v1/completions", json={"prompt": "a", "model": "gpt-4"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_null_is_the_same_as_leaving_out(client):
    names = ("max_tokens", "temperature", "n", "stop", "logit_bias", "logprobs", "suffix", "user")
    given = ask(client, prompt=PROMPT, seed=2, **dict.fromkeys(names))
    assert texts(given) == texts(ask(client, prompt=PROMPT, seed=2))
