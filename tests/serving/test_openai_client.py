"""The openai package as a client of the server: every call that it has for what the server does."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gpt2fast.serving.chat import as_text
from server_process import NAME, POSITIONS, serving
from small_bpe import BPE, SIZE

openai = pytest.importorskip("openai")

KEY = "a-key-of-the-tests-0123456789"
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def guarded(small, tmp_path_factory) -> Iterator:
    """A server that asks for a key, keeps little in its queue, and allows one page of another."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text(f"# of the tests\n{KEY}\nanother-key-0123456789\n")
    flags = ("--api-key-file", str(folder / "keys"), "--max-queue", "2", "--max-rows", "1")
    with serving(small, folder, *flags, "--cors-origin", "https://example.com") as found:
        yield found


@pytest.fixture
def api(server) -> Iterator:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


def test_completions(api, generator):
    answer = api.completions.create(model=NAME, prompt=PROMPT, max_tokens=10, temperature=0)
    alone = generator(PROMPT, max_new_tokens=10, do_sample=False)
    assert answer.choices[0].text == alone.text
    assert answer.usage.completion_tokens == alone.new_tokens
    extra = {"top_k": 1, "return_token_ids": True}
    again = api.completions.create(model=NAME, prompt=PROMPT, max_tokens=10, extra_body=extra)
    assert again.choices[0].text == alone.text
    assert again.choices[0].token_ids == alone.tokens


def test_completions_in_pieces(api):
    body: dict[str, Any] = dict(model=NAME, prompt=PROMPT, max_tokens=30, seed=4, logprobs=1)
    whole = api.completions.create(**body)
    parts = list(
        api.completions.create(**body, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(part.choices[0].text for part in parts[:-1]) == whole.choices[0].text
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": parts[-1].usage.prompt_tokens_details}
    )


def test_conversations(api, generator):
    messages = [
        {"role": "system", "content": "be quick"},
        {"role": "user", "content": [{"type": "text", "text": "the lazy "},
                                     {"type": "text", "text": "dog?"}]},
    ]  # fmt: skip
    text = "System: be quick\n\nUser: the lazy dog?\n\nAssistant:"
    plain = [{**messages[0]}, {"role": "user", "content": "the lazy dog?"}]
    assert as_text(plain) == text
    body: dict[str, Any] = dict(model=NAME, messages=messages, temperature=0)
    answer = api.chat.completions.create(
        **body, max_completion_tokens=10, logprobs=True, top_logprobs=2
    )
    alone = generator(
        text, max_new_tokens=10, do_sample=False, stop=["\nUser:", "\nSystem:"], logprobs=True
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", alone.text)
    kept = choice.logprobs.content
    assert [token.logprob for token in kept] == pytest.approx(alone.logprobs[: len(kept)], abs=1e-5)
    assert bytes(kept[0].bytes) == BPE.token_bytes()[alone.tokens[0]]
    assert len(kept[0].top_logprobs) == 2
    parts = list(api.chat.completions.create(**body, max_tokens=10, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == alone.text
    assert parts[-1].choices[0].finish_reason == choice.finish_reason
    usual = api.chat.completions.create(**body)
    used = usual.usage
    assert used.completion_tokens == POSITIONS - used.prompt_tokens or (
        usual.choices[0].finish_reason == "stop"
    )


def test_an_assistants_last_message_goes_on(api, generator):
    messages = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "the quick"}]
    answer = api.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=5)
    text = "User: say\n\nAssistant: the quick"
    assert (
        answer.choices[0].message.content == generator(text, max_new_tokens=5, do_sample=False).text
    )


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]},
         "messages[0].tool_calls"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)  # fmt: skip
def test_mistakes_in_conversations_are_named(client, changes, param):
    body = {"messages": [{"role": "user", "content": "x"}], **changes}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_embeddings(api, generator):
    texts = ["the lazy dog", "jumps"]
    vectors = torch.nn.functional.normalize(generator.embed(texts), dim=-1)
    answer = api.embeddings.create(model=NAME, input=texts)  # asks for base64
    assert torch.allclose(torch.tensor([one.embedding for one in answer.data]), vectors, atol=1e-5)
    plain = api.embeddings.create(
        model=NAME, input=BPE.encode(texts[1]), encoding_format="float",
        extra_body={"pooling": "last"},
    )  # fmt: skip
    last = torch.nn.functional.normalize(generator.embed(texts[1:], pooling="last"), dim=-1)
    assert plain.data[0].embedding == pytest.approx(last[0].tolist(), abs=1e-5)
    assert plain.usage.prompt_tokens == len(BPE.encode(texts[1]))


def test_base64_is_little_endian_float32(client):
    body = {"input": "the", "encoding_format": "base64"}
    written = client.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    numbers = struct.unpack("<32f", base64.b64decode(written))
    plain = client.post("/v1/embeddings", json={"input": "the"}).json()["data"][0]["embedding"]
    assert numbers == pytest.approx(plain) and sum(x * x for x in plain) == pytest.approx(1)


@pytest.mark.parametrize("given", ["", [], [""], "x y " * 200, [[SIZE]], None])
def test_embeddings_of_nothing_are_refused(client, given):
    answer = client.post("/v1/embeddings", json={"input": given})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("input")


def test_models(api):
    (card,) = api.models.list().data
    assert card.id == NAME and "base model" in card.description
    assert api.models.retrieve(NAME) == card
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt-4")


def test_errors_are_the_clients_own(api):
    with pytest.raises(openai.BadRequestError) as caught:
        api.completions.create(model=NAME, prompt=PROMPT, extra_body={"top_kk": 1})
    assert caught.value.param == "top_kk" and "did you mean top_k?" in str(caught.value)
    with pytest.raises(openai.NotFoundError) as missing:
        api.completions.create(model="gpt-4", prompt=PROMPT)
    assert missing.value.code == "model_not_found"


def test_a_key_is_asked_for(guarded):
    for key in ("wrong", KEY[:-1], KEY + "0", ""):
        with openai.OpenAI(base_url=guarded.url + "/v1", api_key=key or "x", max_retries=0) as api:
            with pytest.raises(openai.AuthenticationError) as caught:
                api.models.list()
            assert caught.value.code == "invalid_api_key"
    for key in (KEY, "another-key-0123456789"):
        with openai.OpenAI(base_url=guarded.url + "/v1", api_key=key) as api:
            assert api.models.list().data[0].id == NAME


def test_health_needs_no_key_and_all_else_does(guarded):
    import httpx

    with httpx.Client(base_url=guarded.url) as client:
        for path in ("/health", "/ready"):
            assert client.get(path).status_code == 200
        for path in ("/version", "/metrics", "/openapi.json", "/v1/models", "/nothing"):
            answer = client.get(path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"


def test_pages_of_the_named_origin_alone_may_read(guarded, server):
    import httpx

    asked = {
        "origin": "https://example.com",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    allowed = httpx.options(guarded.url + "/v1/completions", headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://example.com"
    other = httpx.options(
        guarded.url + "/v1/completions", headers={**asked, "origin": "https://example.org"}
    )
    assert other.status_code == 400
    default = httpx.options(server.url + "/v1/completions", headers=asked)
    assert "access-control-allow-origin" not in default.headers


def test_overload_is_answered_429_with_a_time_to_wait(guarded):
    body = dict(model=NAME, prompt=PROMPT, max_tokens=100, extra_body={"ignore_eos": True})
    with openai.OpenAI(base_url=guarded.url + "/v1", api_key=KEY, max_retries=0) as api:
        with pytest.raises(openai.RateLimitError) as caught:
            api.completions.create(**body, n=100)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "rate_limit_exceeded"
        # None of its choices is left over.
        assert api.completions.create(**body).usage.completion_tokens == 100


def test_speculation_changes_no_answer(small, server, tmp_path):
    body: dict[str, Any] = dict(model=NAME, prompt=PROMPT, max_tokens=80, n=3, seed=9)
    texts = []
    with serving(small, tmp_path, "--speculate", "lookup") as speculating:
        for each in (server, speculating):
            with openai.OpenAI(base_url=each.url + "/v1", api_key="none") as api:
                for temperature in (0, 0.5):
                    answer = api.completions.create(**body, temperature=temperature)
                    texts.append([choice.text for choice in answer.choices])
        lines = httpx_get(speculating.url + "/metrics").splitlines()
        drafted = next(line for line in lines if line.startswith("gpt2fast_drafted_tokens_total "))
    assert texts[:2] == texts[2:] and float(drafted.split()[1]) > 0


def httpx_get(url: str) -> str:
    import httpx

    return httpx.get(url).text
