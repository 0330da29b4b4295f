"""SIGTERM while clients wait: what has begun is finished, or told why not; nothing is lost."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from server_process import Server, serving
from time_limits import deadline, patience

httpx = pytest.importorskip("httpx")
for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)

CLIENTS = 6


def body(number: int, tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "prompt": [number + 1, number + 2], "max_tokens": tokens, "seed": number,
        "ignore_eos": True, **more,
    }  # fmt: skip


class Client:
    """Asks one question after the other until it is refused.

    Args:
        server: whom it asks.
        number: its own.
        stream: ask for pieces.
    """

    def __init__(self, server: Server, number: int, stream: bool) -> None:
        self._url, self._number, self._stream = server.url + "/v1/completions", number, stream
        self.texts: list[str] = []
        self.last: int | None = None
        """The status of the answer that refused it; None where nobody was there any more."""

    def run(self) -> None:
        with httpx.Client(timeout=patience()) as client:
            while True:
                asked = body(self._number, 60, stream=self._stream)
                try:
                    answer = client.post(self._url, json=asked)
                except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError):
                    return  # before a word of an answer
                if answer.status_code != 200:
                    self.last = answer.status_code
                    return
                self.texts.append(whole(answer.text) if self._stream else whole_of(answer.json()))


def whole_of(answer: dict[str, Any]) -> str:
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 60
    return choice["text"]


def whole(stream: str) -> str:
    *events, done, nothing = stream.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    parts = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert parts[-1]["finish_reason"] == "length"
    return "".join(part["text"] for part in parts)


def test_no_answer_that_was_begun_is_lost(small, tmp_path):
    with serving(small, tmp_path, "--max-rows", "2") as server:
        clients = [Client(server, number, number % 2 == 0) for number in range(CLIENTS)]
        threads = [threading.Thread(target=client.run) for client in clients]
        for thread in threads:
            thread.start()
        end = deadline()
        while not all(client.texts for client in clients):
            assert time.monotonic() < end
            time.sleep(0.01)
        server.terminate()
        for thread in threads:
            thread.join(patience())
            assert not thread.is_alive()
        assert server.end() == 0
        for client in clients:
            assert len({*client.texts}) == 1, "an answer was cut"
            assert client.last in (None, 503)
        # Every answer that the server counted as given has arrived, and none was given up.
        given = [entry for entry in server.log("request") if entry["status"] == 200]
        assert sum(len(client.texts) for client in clients) == len(given)
        assert all(entry["reasons"] == ["length"] for entry in given)
        assert [entry["event"] for entry in server.log()][-1] == "ended"


def test_after_the_grace_the_rest_is_told_and_ended(small, tmp_path):
    """A long answer is broken off with an error that says so."""
    flags = ("--grace", "0.2", "--max-rows", "1")
    with serving(small, tmp_path, *flags) as server, ThreadPoolExecutor(2) as pool:
        asked = {stream: body(1, 100, n=100, stream=stream) for stream in (True, False)}
        answers: dict[bool, Future[httpx.Response]] = {
            stream: pool.submit(
                httpx.post, server.url + "/v1/completions", json=each, timeout=patience()
            )
            for stream, each in asked.items()
        }
        end = deadline()
        while _waiting(server) < 150:
            assert time.monotonic() < end
            time.sleep(0.01)
        server.terminate()
        assert server.end() == 0
        refused = answers[False].result()
        assert refused.status_code == 503
        assert "shut down before" in refused.json()["error"]["message"]
        *_, last, nothing = answers[True].result().text.split("\n\n")
        assert nothing == "" and "shut down before" in json.loads(last[6:])["error"]["message"]


def _waiting(server: Server) -> float:
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    return next(
        float(line.split()[1]) for line in lines if line.startswith("gpt2fast_requests_waiting ")
    )
