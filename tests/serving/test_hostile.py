"""Hostile requests, slow senders and readers, and clients that hang up: refused, and nobody else
is disturbed."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from hostile_requests import HOST, JSON, LARGE_FORMS, Hostile, hostile_requests, post
from server_process import Server, serving
from time_limits import deadline, patience

httpx = pytest.importorskip("httpx")

FLAGS = (
    "--max-body", "1000000", "--max-tokens", "100", "--max-choices", "8", "--header-timeout", "2",
    "--body-timeout", "2", "--write-timeout", "2", "--max-logprobs", "280", 
    "--max-connections", "40",
)  # fmt: skip
REQUESTS = list(hostile_requests())
GROUPS = 8


@pytest.fixture(scope="module")
def fortress(small, tmp_path_factory) -> Iterator[Server]:
    """A server with low limits."""
    for package in ("starlette", "uvicorn", "prometheus_client", "llguidance"):
        pytest.importorskip(package)
    with serving(small, tmp_path_factory.mktemp("fortress"), *FLAGS) as found:
        yield found
        assert found.log("failure") == []


def talk(server: Server, content: bytes) -> tuple[int, bytes, bytes]:
    """Send bytes; the status, the headers and the body of the answer."""
    with socket.create_connection(("127.0.0.1", server.port), patience()) as connection:
        connection.settimeout(patience())
        sender = threading.Thread(target=_send, args=(connection, content))
        sender.start()
        reader = connection.makefile("rb")
        status = int(reader.readline().split()[1])
        headers = b"".join(iter(reader.readline, b"\r\n"))
        length = next(
            int(line.split(b":")[1])
            for line in headers.splitlines()
            if line.lower().startswith(b"content-length")
        )
        body = reader.read(length)
        with suppress(OSError):  # the server may have ended it already
            connection.shutdown(socket.SHUT_RDWR)
        sender.join()
    return status, headers, body


def _send(connection: socket.socket, content: bytes) -> None:
    with suppress(OSError):  # the answer has come, and the rest is not wanted
        connection.sendall(content)


def test_there_are_over_two_hundred():
    assert len({str(each) for each in REQUESTS}) == len(REQUESTS) > 200


@pytest.mark.parametrize("group", range(GROUPS))
def test_each_is_refused_and_another_client_is_not_disturbed(fortress, group):
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(_ask_again_and_again, fortress, stop)
        try:
            for hostile in REQUESTS[group::GROUPS]:
                _check(fortress, hostile)
        finally:
            stop.set()
        answers = other.result(patience())
    assert len({text for _, text in answers}) == 1
    assert max(seconds for seconds, _ in answers) < patience() / 20


def _check(server: Server, hostile: Hostile) -> None:
    status, headers, body = talk(server, hostile.content)
    assert status in hostile.statuses, (hostile.name, status, body[:300])
    assert b"application/json" in headers, (hostile.name, headers)
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 10 < len(error["message"]) <= 1000, (hostile.name, error)


def _ask_again_and_again(server: Server, stop: threading.Event) -> list[tuple[float, str]]:
    answers: list[tuple[float, str]] = []
    body = {"prompt": "the quick", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    with httpx.Client(base_url=server.url, timeout=patience()) as client:
        while not stop.is_set() or not answers:
            begin = time.monotonic()
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            answers.append((time.monotonic() - begin, answer.json()["choices"][0]["text"]))
    return answers


def test_large_formats_disturb_nobody(fortress):
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=fortress.url) as client:
        other = pool.submit(_ask_again_and_again, fortress, stop)
        try:
            for form in LARGE_FORMS:
                body = {"prompt": "a", "max_tokens": 30, "response_format": form}
                answer = client.post("/v1/completions", json=body, timeout=patience())
                assert answer.status_code in (200, 400), (form, answer.text)
        finally:
            stop.set()
        assert max(seconds for seconds, _ in other.result(patience())) < patience() / 20


@pytest.mark.parametrize("seed", range(4))
def test_random_bodies_are_answered_or_refused(fortress, seed):
    """Valid requests with random values in random places."""
    generator = random.Random(seed)
    valid: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "a", "max_tokens": 2, "n": 2, "stop": ["x"], "logprobs": 1},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
        "/v1/embeddings": {"input": ["a", "b"], "encoding_format": "float"},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [1, 2]},
        "/attention": {"tokens": [1, 2], "layer": 0, "head": 1},
    }
    names = ["echo", "best_of", "seed", "top_k", "response_format", "stream_options", "logit_bias"]
    with httpx.Client(base_url=fortress.url, timeout=patience()) as client:
        for _ in range(60):
            path = generator.choice(list(valid))
            body = dict(valid[path])
            for _ in range(generator.randint(1, 3)):
                body[generator.choice([*body, *names])] = _value(generator, 0)
            answer = client.post(path, json=body)
            assert answer.status_code in (200, 400, 404, 413), (path, body, answer.text)
            kinds = ("application/json", "text/event-stream; charset=utf-8")
            assert answer.headers["content-type"] in kinds


def _value(generator: random.Random, depth: int) -> Any:
    kind = generator.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return generator.choice([None, True, False])
    if kind == 1:
        return generator.choice([0, 1, 2, -1, 10**9, 2**63, -(2**70), 10**300])
    if kind == 2:
        return generator.choice([0.0, 0.5, -0.0, 1e-300, 1e300, 3.0])
    if kind in (3, 4, 5):
        length = generator.randrange(6)
        return "".join(chr(generator.choice([32, 97, 0, 0x2603, 0x1F600])) for _ in range(length))
    if kind == 6:
        return {_value(generator, 3).__str__(): _value(generator, depth + 1) for _ in range(2)}
    return [_value(generator, depth + 1) for _ in range(generator.randrange(4))]


def closes(connection: socket.socket) -> bool:
    """Wait for the server to end a connection; False if it does not."""
    connection.settimeout(patience())
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("content", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nx-a: "], ids=str)
def test_headers_that_do_not_come_are_not_waited_for(fortress, content):
    with socket.create_connection(("127.0.0.1", fortress.port)) as connection:
        connection.sendall(content)
        assert closes(connection)


def test_a_byte_now_and_then_is_too_slow_after_an_answer_as_well(fortress):
    with socket.create_connection(("127.0.0.1", fortress.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200")
        with pytest.raises(OSError):
            _drip(connection, b"GET /health HTTP/1.1\r\nx-a: " + b"y" * 10_000)


def _drip(connection: socket.socket, content: bytes) -> None:
    end = deadline()
    for byte in content:
        connection.sendall(bytes([byte]))
        time.sleep(0.2)
        assert time.monotonic() < end


def test_a_body_that_does_not_come_is_not_waited_for(fortress):
    whole = post("/v1/completions", b'{"prompt": "a"}')
    status, _, body = talk(fortress, whole[:-5])
    assert status == 408 and b"body_timeout" in body


def test_continue_is_said_before_a_body(fortress):
    body = b'{"prompt": "a", "max_tokens": 1}'
    whole = post("/v1/completions", body, JSON + b"expect: 100-continue\r\n")
    with socket.create_connection(("127.0.0.1", fortress.port)) as connection:
        connection.settimeout(patience())
        connection.sendall(whole[: -len(body)])
        assert connection.recv(1000).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200")


def test_more_connections_than_allowed_are_told_so_and_health_is_answered(fortress):
    open_ones = [socket.create_connection(("127.0.0.1", fortress.port)) for _ in range(45)]
    try:
        refused = httpx.get(fortress.url + "/version")
        assert refused.status_code == 503 and "max_connections" in refused.text
        assert httpx.get(fortress.url + "/health").status_code == 200
    finally:
        for each in open_ones:
            each.close()
    end = deadline()
    while httpx.get(fortress.url + "/version").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.1)


def running(server: Server) -> tuple[float, float, float]:
    """Choices that run and wait, and pages that are held."""
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    names = ("requests_running", "requests_waiting", "cache_pages_used")
    found = {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#"}
    first, second, third = (found[f"gpt2fast_{name}"] for name in names)
    return first, second, third


def becomes_idle(server: Server) -> None:
    end = deadline()
    while any(running(server)):
        assert time.monotonic() < end, running(server)
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_leaves_nothing_behind(fortress, stream):
    becomes_idle(fortress)
    body = {"prompt": "the quick", "max_tokens": 64, "n": 8, "ignore_eos": True, "stream": stream}
    content = post("/v1/completions", json.dumps(body).encode())
    before = len(fortress.log("request"))
    for wait in (0, 0, 0.01, 0.02, 0.05):
        with socket.create_connection(("127.0.0.1", fortress.port)) as connection:
            connection.sendall(content)
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            time.sleep(wait)
    becomes_idle(fortress)
    assert len(fortress.log("request")) >= before + 5


def test_who_does_not_read_is_not_waited_for(fortress):
    """The answer is larger than what the system keeps for a reader."""
    body = {
        "prompt": ["the quick brown fox"] * 8, "max_tokens": 100, "stream": True,
        "ignore_eos": True, "logprobs": 280,
    }  # fmt: skip
    content = post("/v1/completions", json.dumps(body).encode())
    other = {"prompt": "a", "max_tokens": 4}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", fortress.port))
        connection.sendall(content)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        answer = httpx.post(fortress.url + "/v1/completions", json=other, timeout=patience())
        assert answer.status_code == 200
        becomes_idle(fortress)
        end = deadline()
        while connections(fortress) > 1:
            assert time.monotonic() < end
            time.sleep(0.1)
        found = b""
        with suppress(ConnectionError):
            while part := connection.recv(1 << 20):
                found = found[-100:] + part
        assert b"[DONE]" not in found


def connections(server: Server) -> float:
    text = httpx.get(server.url + "/metrics").text
    return next(
        float(line.split()[1])
        for line in text.splitlines()
        if line.startswith("gpt2fast_connections ")
    )
