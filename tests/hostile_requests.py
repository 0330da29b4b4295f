"""Requests that a server must refuse, as bytes on a connection: over two hundred of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

NUMBERS = (
    "max_tokens",
    "min_tokens",
    "n",
    "best_of",
    "logprobs",
    "top_k",
    "seed",
    "no_repeat_ngram_size",
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
)
NO_NUMBERS = {
    "NaN": "NaN",
    "infinity": "-Infinity",
    "beyond floats": "1e999",
    "far below": "-1" + "0" * 30,
    "400 digits": "9" * 400,
    "text": '"5"',
    "list": "[1]",
    "true": "true",
}
BODIES = {
    "nothing": b"",
    "no object": b"[]",
    "a number": b"5",
    "no JSON": b"{prompt: 1}",
    "cut": b'{"prompt": "a',
    "more than one": b'{"prompt": "a"}{"prompt": "a"}',
    "twice": b'{"prompt": "a", "prompt": "b"}',
    "not UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "deep lists": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep and open": b"[" * 300_000,
    "many values": b'{"prompt": [' + b"1," * 600_000 + b"1]}",
    "many names": json.dumps({f"name{i}": i for i in range(20_000)}).encode(),
    "a long name": b'{"' + b"x" * 500_000 + b'": 1}',
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "a long text": json.dumps({"prompt": "word " * 100_000}).encode(),
    "no spaces": json.dumps({"prompt": "x" * 800_000}).encode(),
    "only spaces": json.dumps({"prompt": " " * 800_000}).encode(),
    "tokens": json.dumps({"prompt": [1] * 100_000}).encode(),
    "too many texts": json.dumps({"prompt": ["a"] * 100_000}).encode(),
    "negative token": b'{"prompt": [-1]}',
    "huge token": b'{"prompt": [1000000000]}',
    "null token": b'{"prompt": [1, null]}',
    "a thousand stops": json.dumps({"prompt": "a", "stop": ["x"] * 1000}).encode(),
    "a bias of texts": b'{"prompt": "a", "logit_bias": {"x": 1}}',
    "a huge bias": b'{"prompt": "a", "logit_bias": {"1": 1e300}}',
    "a bias of a huge id": b'{"prompt": "a", "logit_bias": {"99999999999999999999": 1}}',
    "many biases": json.dumps(
        {"prompt": "a", "logit_bias": {str(i): 1 for i in range(50_000)}}
    ).encode(),
    "a file": b'{"prompt": "a", "model": "../../etc/passwd"}',
    "a schema of nothing": b'{"prompt": "a", "response_format": {"type": "json_schema"}}',
    "no regex": b'{"prompt": "a", "response_format": {"type": "regex", "regex": "("}}',
    "no grammar": b'{"prompt": "a", "response_format": {"type": "lark", "lark": "x ::"}}',
    "a long grammar": json.dumps(
        {"prompt": "a", "response_format": {"type": "lark", "lark": "a" * 100_000}}
    ).encode(),
    "a schema that refers to itself": json.dumps(
        {
            "prompt": "a",
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"$ref": "#"}},
            },
        }
    ).encode(),
    "a schema elsewhere": json.dumps(
        {
            "prompt": "a",
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"$ref": "http://127.0.0.1:9/x.json"}},
            },
        }
    ).encode(),
    "suffix": b'{"prompt": "a", "suffix": "b"}',
    "a misspelled name": b'{"promt": "a"}',
}

LARGE_FORMS = (
    {"type": "regex", "regex": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"},
    {"type": "regex", "regex": "(.*a){40}"},
    {"type": "regex", "regex": "(a|b)*a(a|b){60}"},
    {"type": "regex", "regex": "(" * 3000 + "a" + ")" * 3000},
    {"type": "lark", "lark": "start: start start | /./"},
    {"type": "lark", "lark": "start: " + " ".join(["(a | b)"] * 300) + '\na: "a"\nb: "b" a*'},
    {"type": "choice", "choices": ["ab" * i for i in range(1, 500)]},
    {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    {"type": "json_schema", "json_schema": {"schema": {"enum": list(range(20_000))}}},
)
"""Formats that take much work, and may be refused for it, as they are made or on the way."""

JSON = b"content-type: application/json\r\n"
HOST = b"host: localhost\r\n"


@dataclass(frozen=True)
class Hostile:
    """A request, and what may be answered."""

    name: str
    content: bytes
    statuses: tuple[int, ...] = (400,)
    is_json: bool = True
    """The answer has the form of all errors."""

    def __str__(self) -> str:
        return self.name


def post(path: str, body: bytes, headers: bytes = JSON) -> bytes:
    """A POST request."""
    length = f"content-length: {len(body)}\r\n".encode()
    return b"POST " + path.encode() + b" HTTP/1.1\r\n" + HOST + headers + length + b"\r\n" + body


def hostile_requests() -> Iterator[Hostile]:
    """All of them."""
    for name in NUMBERS:
        for kind, value in NO_NUMBERS.items():
            body = f'{{"prompt": "a", "{name}": {value}}}'.encode()
            yield Hostile(f"{name}: {kind}", post("/v1/completions", body))
    for name, body in BODIES.items():
        statuses = (400, 404) if name == "a file" else (400, 413)
        yield Hostile(name, post("/v1/completions", body), statuses)
    for name in ("deep lists", "not UTF-8", "no object", "many names"):
        for path in ("/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"):
            yield Hostile(f"{path}: {name}", post(path, BODIES[name]))
    yield from _of_chat()
    yield from _of_http()


def _of_chat() -> Iterator[Hostile]:
    path = "/v1/chat/completions"
    for name, messages in {
        "no messages": [],
        "messages of texts": ["a"],
        "no role": [{"content": "a"}],
        "another role": [{"role": "root", "content": "a"}],
        "content of numbers": [{"role": "user", "content": 5}],
        "an image": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        "ten thousand": [{"role": "user", "content": "a"}] * 10_000,
        "long": [{"role": "user", "content": "word " * 100_000}],
    }.items():
        yield Hostile(f"chat: {name}", post(path, json.dumps({"messages": messages}).encode()))


def _of_http() -> Iterator[Hostile]:
    path, small = "/v1/completions", b'{"prompt": "a"}'
    line = b"POST /v1/completions HTTP/1.1\r\n"
    yield Hostile(
        "declared gigabyte", line + HOST + JSON + b"content-length: 1073741824\r\n\r\n", (413,)
    )
    yield Hostile(
        "declared more than numbers hold",
        line + HOST + JSON + b"content-length: " + b"9" * 25 + b"\r\n\r\n",
        (400, 413),
    )
    yield Hostile("large body", post(path, b'{"prompt": "' + b"x" * 1_500_000 + b'"}'), (413,))
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    yield Hostile(
        "large body in chunks",
        line + HOST + JSON + b"transfer-encoding: chunked\r\n\r\n" + chunk * 24,
        (413,),
    )
    yield Hostile("no chunk", line + HOST + JSON + b"transfer-encoding: chunked\r\n\r\nxyz\r\n\r\n")
    yield Hostile(
        "two lengths", line + HOST + JSON + b"content-length: 5\r\ncontent-length: 6\r\n\r\n12345"
    )
    yield Hostile("negative length", line + HOST + JSON + b"content-length: -1\r\n\r\n")
    yield Hostile("gzip", line + HOST + JSON + b"transfer-encoding: gzip\r\n\r\n", (400, 501))
    yield Hostile("many headers", line + HOST + b"x: y\r\n" * 20_000 + b"\r\n", (400, 415))
    yield Hostile("a long header", line + HOST + b"x: " + b"y" * 300_000 + b"\r\n\r\n")
    yield Hostile("a long path", b"GET /" + b"x" * 300_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    yield Hostile(
        "no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100 + b"\r\n"
    )
    yield Hostile("a header without a name", line + HOST + b": y\r\n\r\n")
    yield Hostile("NUL in a header", line + HOST + b"x: \0\r\n\r\n")
    yield Hostile("no host", b"GET /health HTTP/1.1\r\n\r\n", (400,))
    yield Hostile("another host", b"GET /version HTTP/1.1\r\nhost: evil.example\r\n\r\n", (403,))
    for kind in (b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data"):
        yield Hostile(
            f"content-type {kind.decode()}",
            post(path, small, b"content-type: " + kind + b"\r\n"),
            (415,),
        )
    yield Hostile("no content-type", post(path, small, b""), (415,))
    for method in (b"GET", b"PUT", b"DELETE", b"PATCH", b"TRACE", b"BREW"):
        yield Hostile(
            f"{method.decode()} of completions",
            method + b" /v1/completions HTTP/1.1\r\n" + HOST + b"\r\n",
            (405,),
        )
    for place in (
        b"/static/../app.py",
        b"/static/%2e%2e/app.py",
        b"/static/..%2fapp.py",
        b"//etc/passwd",
        b"/static/%00",
        b"/v1/models/../../x",
        b"/%ff%fe",
        b"/v1/",
    ):
        yield Hostile(
            f"path {place.decode()}",
            b"GET " + place + b" HTTP/1.1\r\n" + HOST + b"\r\n",
            (404, 405),
        )
