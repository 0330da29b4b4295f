"""Many clients at one server of OpenAI's protocol: speed, waiting times, and what is left behind.

    python load.py http://127.0.0.1:8000 --clients 32 --seconds 60
    python load.py http://127.0.0.1:8000 --clients 64 --seconds 300 --hang-up 0.33
    python load.py http://127.0.0.1:8080 --model any   # llama.cpp's server, vLLM, …

Each client asks for one completion after the other, in pieces, and notes when each piece comes; a
part of them may hang up midway. Tokens are counted by the server (`stream_options.include_usage`),
those of answers that were left are not. Of a gpt2fast server, what its /metrics says before and
after is told, too: pages of the cache that are held when nobody asks any more are a leak.

It is one process of plain asyncio, which takes a part of a processor itself: on a small machine,
figures are those of server and clients together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_WORDS = [
    "time", "people", "way", "water", "day", "man", "thing", "woman",
    "life", "child", "world", "school", "state", "family", "student", "group",
    "country", "problem", "hand", "part", "place", "case", "week", "company",
    "system", "program", "question", "work", "government", "number", "night", "point",
    "home", "room", "mother", "area", "money", "story", "fact", "month",
    "lot", "right", "study", "book", "eye", "job", "word", "business",
    "issue", "side", "kind", "head", "house", "service", "friend", "father",
    "power", "hour", "game", "line", "end",
]  # fmt: skip
"""Each is one token of GPT-2 after a space."""
_SETTLES = 30.0
"""Seconds in which a server should have noticed that everybody has left."""


@dataclass
class Found:
    """What clients saw."""

    finished: int = 0
    left: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    new_tokens: int = 0
    first: list[float] = field(default_factory=list)
    """Seconds from a request to its first piece."""
    between: list[float] = field(default_factory=list)
    """Seconds from a piece to the next."""


@dataclass
class Plan:
    """What clients do."""

    url: str
    model: str | None
    key: str | None
    prompt_words: int
    shared_words: int
    max_tokens: int
    hang_up: float
    seed: int

    def request(self, number: int) -> bytes:
        """The bytes of a request."""
        draw = random.Random(f"{self.seed}/{number}")
        shared = random.Random(self.seed)
        words = [shared.choice(_WORDS) for _ in range(self.shared_words)]
        words += [draw.choice(_WORDS) for _ in range(self.prompt_words - self.shared_words)]
        body = {
            "prompt": " ".join(words),
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "temperature": 1.0,
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.model is not None:
            body["model"] = self.model
        content = json.dumps(body).encode()
        lines = [
            "POST /v1/completions HTTP/1.1",
            f"host: {urlsplit(self.url).netloc}",
            "content-type: application/json",
            f"content-length: {len(content)}",
        ]
        if self.key is not None:
            lines.append(f"authorization: Bearer {self.key}")
        return "\r\n".join([*lines, "", ""]).encode() + content


class Connection:
    """A connection that is kept for several requests."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._place = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, content: bytes) -> tuple[int, dict[str, str]]:
        """Send a request; the status and the headers of its answer."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(*self._place)
        assert self._reader is not None
        self._writer.write(content)
        await self._writer.drain()
        status = int((await self._line()).split()[1])
        headers = {}
        while line := await self._line():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return status, headers

    async def body(self, headers: dict[str, str]) -> AsyncIterator[bytes]:
        """The body in the parts in which it comes."""
        assert self._reader is not None
        if "chunked" in headers.get("transfer-encoding", ""):
            while size := int((await self._line()).partition(";")[0], 16):
                yield await self._reader.readexactly(size)
                await self._line()
            await self._line()
        elif "content-length" in headers:
            yield await self._reader.readexactly(int(headers["content-length"]))
        else:
            while part := await self._reader.read(65536):
                yield part
            self.close()
        if headers.get("connection", "").lower() == "close":
            self.close()

    def close(self) -> None:
        """Hang up, in whatever state it is."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    async def _line(self) -> str:
        assert self._reader is not None
        line = await self._reader.readline()
        if not line:
            raise ConnectionError("the server has closed the connection")
        return line.decode("latin-1").rstrip("\r\n")


async def _client(plan: Plan, numbers: list[int], end: float, found: Found) -> None:
    connection = Connection(plan.url)
    try:
        while time.monotonic() < end and numbers:
            number = numbers.pop()
            try:
                await _ask(plan, number, connection, found)
            except (OSError, ValueError, asyncio.IncompleteReadError) as error:
                found.failures[f"{type(error).__name__}: {error}"[:100]] += 1
                connection.close()
                await asyncio.sleep(0.1)
    finally:
        connection.close()


async def _ask(plan: Plan, number: int, connection: Connection, found: Found) -> None:
    draw = random.Random(f"{plan.seed}/{number}/leaves")
    leaves = draw.randrange(1, plan.max_tokens) if draw.random() < plan.hang_up else None
    begin = before = time.perf_counter()
    status, headers = await connection.send(plan.request(number))
    pieces = 0
    rest = b""
    done = False
    async for part in connection.body(headers):
        *lines, rest = (rest + part).split(b"\n")
        if status != 200:
            continue
        now = time.perf_counter()
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            content = line[5:].strip()
            if content == b"[DONE]":
                done = True
                continue
            event = json.loads(content)
            if "error" in event:
                raise ValueError(event["error"].get("message", "error"))
            if event.get("usage"):
                found.prompt_tokens += event["usage"]["prompt_tokens"]
                found.new_tokens += event["usage"]["completion_tokens"]
            if not event.get("choices"):
                continue
            if pieces == 0:
                found.first.append(now - begin)
            else:
                found.between.append(now - before)
            before = now
            pieces += 1
            if pieces == leaves:
                found.left += 1
                connection.close()
                return
    if status != 200:
        found.failures[f"status {status}"] += 1
        await asyncio.sleep(float(headers.get("retry-after", 0.1)))
    elif done:
        found.finished += 1
    else:
        found.failures["an answer without an end"] += 1


async def _metrics(plan: Plan) -> dict[str, float] | None:
    """Numbers of /metrics, or None where there are none of gpt2fast's."""
    key = "" if plan.key is None else f"authorization: Bearer {plan.key}\r\n"
    host = urlsplit(plan.url).netloc
    connection = Connection(plan.url)
    try:
        asked = f"GET /metrics HTTP/1.1\r\nhost: {host}\r\n{key}\r\n".encode()
        status, headers = await connection.send(asked)
        text = b"".join([part async for part in connection.body(headers)]).decode()
    except (OSError, ValueError):
        return None
    finally:
        connection.close()
    if status != 200 or "gpt2fast_" not in text:
        return None
    pairs = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


async def _load(plan: Plan, clients: int, requests: int, seconds: float) -> dict[str, object]:
    found = Found()
    before = await _metrics(plan)
    numbers = list(range(requests))[::-1]
    begin = time.monotonic()
    end = begin + seconds
    await asyncio.gather(*(_client(plan, numbers, end, found) for _ in range(clients)))
    took = time.monotonic() - begin
    report: dict[str, object] = {
        "clients": clients,
        "seconds": round(took, 2),
        "finished": found.finished,
        "hung up": found.left,
        "failures": dict(found.failures),
        "new tokens/s": round(found.new_tokens / took, 1),
        "prompt tokens/s": round(found.prompt_tokens / took, 1),
        "first piece, ms": _spread(found.first),
        "between pieces, ms": _spread(found.between),
    }
    after = await _settled(plan) if before is not None else None
    if before is not None and after is not None:
        report["pages held before and after"] = [
            each["gpt2fast_cache_pages_used"] for each in (before, after)
        ]
        memory = "process_resident_memory_bytes"
        report["memory before and after, MB"] = [
            round(each.get(memory, 0) / 1e6, 1) for each in (before, after)
        ]
        hits = "gpt2fast_prefix_hit_tokens_total"
        report["tokens of prompts found in the cache"] = after[hits] - before[hits]
    return report


async def _settled(plan: Plan) -> dict[str, float] | None:
    """/metrics when nothing runs any more, or after a while."""
    end = time.monotonic() + _SETTLES
    while True:
        found = await _metrics(plan)
        names = ("requests_running", "requests_waiting", "cache_pages_used")
        if found is None or not any(found[f"gpt2fast_{name}"] for name in names):
            return found
        if time.monotonic() > end:
            return found
        await asyncio.sleep(0.2)


def _spread(seconds: list[float]) -> dict[str, float]:
    """The median, the 95th percentile and the largest, in milliseconds."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    places = {"median": len(ordered) // 2, "p95": int(len(ordered) * 0.95), "most": -1}
    return {name: round(ordered[place] * 1e3, 2) for name, place in places.items()}


def main() -> int:
    """Run the command line; 1 if requests failed or pages are held at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("url", help="of the server, without /v1")
    add("--clients", type=int, default=32)
    add("--requests", type=int, default=1_000_000, help="at most so many")
    add("--seconds", type=float, default=30.0, help="ask no more after so long")
    add("--prompt-tokens", type=int, default=128, help="words of a prompt, which are its tokens")
    add("--shared-tokens", type=int, default=0, help="those with which all prompts begin")
    add("--max-tokens", type=int, default=128)
    add("--hang-up", type=float, default=0.0, help="the part of requests that are left midway")
    add("--model", help="name to ask for, where the server wants one")
    add("--api-key")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    plan = Plan(
        args.url.rstrip("/"), args.model, args.api_key, args.prompt_tokens, args.shared_tokens,
        args.max_tokens, args.hang_up, args.seed,
    )  # fmt: skip
    report = asyncio.run(_load(plan, args.clients, args.requests, args.seconds))
    print(json.dumps(report, indent=2))
    held = report.get("pages held before and after", [0, 0])
    assert isinstance(held, list)
    return int(bool(report["failures"]) or held[1] > 0)


if __name__ == "__main__":
    sys.exit(main())
