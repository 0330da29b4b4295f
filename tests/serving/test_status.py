"""What the server says about itself, its log, and tokens of texts."""

from __future__ import annotations

import pytest

import gpt2fast
from server_process import NAME, POSITIONS
from small_bpe import BPE, SIZE

PROMPT = "the quick brown fox"


def test_health_and_version(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    assert client.get("/version").json() == {"version": gpt2fast.__version__}


def test_metrics_count(client):
    before = metrics(client)
    body = {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True, "n": 2}
    assert client.post("/v1/completions", json=body).status_code == 200
    assert client.post("/v1/completions", json={"prompt": 5}).status_code == 400
    after = metrics(client)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more('gpt2fast_requests_total{endpoint="/v1/completions",status="200"}') == 1
    assert more('gpt2fast_requests_total{endpoint="/v1/completions",status="400"}') == 1
    assert more('gpt2fast_choices_finished_total{reason="length"}') == 2
    assert more("gpt2fast_time_to_first_token_seconds_count") == 2
    assert more("gpt2fast_time_between_tokens_seconds_count") == 8
    assert more("gpt2fast_generated_tokens_total") == 10
    assert more("gpt2fast_prompt_tokens_total") == 2 * len(BPE.encode(PROMPT))
    assert after["gpt2fast_requests_running"] == after["gpt2fast_requests_waiting"] == 0
    assert after["gpt2fast_cache_pages_used"] == 0 < after["gpt2fast_cache_pages"]
    assert after["gpt2fast_connections"] >= 1


def metrics(client) -> dict[str, float]:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_tokens_of_a_text_and_back(client):
    text = "a lazy ☃ dog"
    found = client.post("/tokenize", json={"prompt": text}).json()
    assert found == {
        "tokens": BPE.encode(text), "count": len(BPE.encode(text)), "max_model_len": POSITIONS,
    }  # fmt: skip
    back = client.post("/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": text}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    assert client.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    assert client.post("/detokenize", json={"tokens": [SIZE]}).status_code == 400


def test_attention_of_a_text(client):
    tokens = BPE.encode(PROMPT)
    body = {"tokens": tokens, "layer": 1, "head": 1}
    found = client.post("/attention", json=body).json()
    assert "".join(found["tokens"]) == PROMPT
    assert [len(row) for row in found["weights"]] == list(range(1, len(tokens) + 1))
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in found["weights"])
    by_text = client.post("/attention", json={"prompt": PROMPT, "layer": 1, "head": 1}).json()
    assert by_text == found
    for wrong in ({}, {"prompt": "a", "tokens": [1]}, {"prompt": "a", "layer": 2}, {"tokens": []}):
        assert client.post("/attention", json=wrong).status_code == 400


def test_a_request_has_an_id_and_a_line_in_the_log(server, client):
    given = client.post(
        "/v1/completions", json={"prompt": "secret words", "max_tokens": 3, "ignore_eos": True},
        headers={"x-request-id": "mine-1"},
    )  # fmt: skip
    assert given.headers["x-request-id"] == "mine-1"
    odd = client.get("/version", headers={"x-request-id": "a b"})
    assert odd.headers["x-request-id"].startswith("req-")
    (line,) = [entry for entry in server.log("request") if entry["id"] == "mine-1"]
    assert (line["status"], line["new_tokens"], line["reasons"]) == (200, 3, ["length"])
    assert line["path"] == "/v1/completions" and line["client"] == "127.0.0.1"
    assert "secret" not in str(server.log())


def test_unknown_paths_and_methods_are_json_errors(client):
    missing = client.get("/v2/completions")
    assert missing.status_code == 404 and "/v2/completions" in missing.json()["error"]["message"]
    wrong = client.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert "use POST" in wrong.json()["error"]["message"]


def test_the_name_of_the_model_is_its_folders(client):
    assert client.get("/v1/models").json()["data"][0]["id"] == NAME
