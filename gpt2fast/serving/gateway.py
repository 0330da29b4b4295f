"""What stands before every endpoint: who is let in, and what is noted of each request."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request as HttpRequest

from . import logs
from .body import Disconnected, discard
from .connections import Connections
from .failures import Refusal, refusal_of, unavailable
from .metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/ready")
"""Paths that need no key, beside those below /static/."""
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Access:
    """Who is let in."""

    keys: tuple[bytes, ...] = ()
    """Keys, one of which a client has to send; none: everybody is let in."""
    hosts: tuple[str, ...] = ()
    """Names in the header Host, besides those of this computer; "*" stands for all. With a key, or
    where the server is bound to other addresses, all are taken."""
    checks_host: bool = True
    """Refuse other names in the header Host: a page of another site that has its name point here
    is not let in."""


@dataclass
class Note:
    """What is written down about a request."""

    id: str
    started: float
    status: int = 0
    endpoint: str = "unknown"
    fields: dict[str, Any] = field(default_factory=dict)


class Gateway:
    """An ASGI application around another one.

    Args:
        app: answers what is let in.
        access: who is.
        connections: the open ones.
        metrics: counts answers.
        endpoints: paths that have a name of their own in logs and metrics.
        is_draining: says whether the server is about to end, and takes no new work.
    """

    def __init__(
        self,
        app: App,
        access: Access,
        connections: Connections,
        metrics: Metrics,
        endpoints: frozenset[str],
        is_draining: Callable[[], bool],
    ) -> None:
        self._app, self._access, self._connections = app, access, connections
        self._metrics, self._endpoints = metrics, endpoints
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = HttpRequest(scope, receive)
        address = scope["client"]
        self._connections.arrived(address)
        note = self._note(request)
        scope.setdefault("state", {})["note"] = note
        outer = self._noting(note, request, send)
        try:
            self._admit(request)
            await self._app(scope, receive, outer)
        except Disconnected:
            note.status = note.status or 499  # as nginx writes down a client that has left
        except Refusal as refusal:
            await self._refuse(refusal, note, request, outer)
        except Exception as error:
            answer = refusal_of(error)
            if answer.status >= 500:
                logs.record("failure", logging.ERROR, error, id=note.id)
            await self._refuse(answer, note, request, outer)
        finally:
            self._end(note, request)
            self._connections.waits(address)

    def _note(self, request: HttpRequest) -> Note:
        given = request.headers.get("x-request-id", "")
        id = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        path = request.url.path
        endpoint = "/static" if path.startswith("/static/") else path
        if path.startswith("/v1/models/"):
            endpoint = "/v1/models"
        known = endpoint in self._endpoints or endpoint == "/static"
        return Note(id, time.perf_counter(), endpoint=endpoint if known else "unknown")

    def _admit(self, request: HttpRequest) -> None:
        path = request.url.path
        if path in ("/health", "/ready"):
            return
        if self._connections.are_too_many:
            raise Refusal(
                "the server has as many connections as it takes (max_connections): try again "
                "later, and keep connections open between requests", 503,
                code="unavailable", headers={"retry-after": "1"}, close=True,
            )  # fmt: skip
        if self._is_draining() and request.method == "POST":
            raise unavailable("the server is shutting down: ask another one")
        access = self._access
        if not access.keys and access.checks_host:
            self._check_host(request.headers.get("host", ""))
        if path in OPEN or path.startswith("/static/"):
            return
        if access.keys:
            self._check_key(request.headers.get("authorization", ""))

    def _check_host(self, host: str) -> None:
        name = re.sub(r":\d*\Z", "", host).lower()
        allowed = (*_LOOPBACK, *self._access.hosts)
        if "*" not in allowed and name not in allowed:
            raise Refusal(
                f"the header Host names {host[:100]!r}, and this server answers to "
                f"{', '.join(allowed)}: start it with --allow-host NAME, or with an API key",
                403,
                code="host_not_allowed",
                close=True,
            )

    def _check_key(self, given: str) -> None:
        scheme, _, key = given.partition(" ")
        sent = key.strip().encode("utf-8", "replace") if scheme.lower() == "bearer" else b""
        # All keys are compared, and in constant time: the time tells nothing about them.
        matches = [hmac.compare_digest(sent, one) for one in self._access.keys]
        if not any(matches):
            wrong = "is not one of this server's" if given else "is missing"
            raise Refusal(
                f"the API key {wrong}: send the header Authorization: Bearer KEY",
                401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
                close=True,
            )

    def _noting(self, note: Note, request: HttpRequest, send: Send) -> Send:
        extra = [(b"x-request-id", note.id.encode())]

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                note.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        return sending

    async def _refuse(self, refusal: Refusal, note: Note, request: HttpRequest, send: Send) -> None:
        if note.status:  # the answer has begun, and can only be broken off
            self._connections.cut(request.scope["client"])
            return
        answer = refusal.response()
        await send({
            "type": "http.response.start", "status": answer.status_code,
            "headers": answer.raw_headers,
        })  # fmt: skip
        body = {"type": "http.response.body", "body": answer.body}
        if refusal.close and request.method == "POST":
            await send({**body, "more_body": True})
            await discard(request)
            body["body"] = b""
        await send(body)

    def _end(self, note: Note, request: HttpRequest) -> None:
        seconds = time.perf_counter() - note.started
        self._metrics.answered(note.endpoint, note.status, seconds)
        logs.record(
            "request", id=note.id, client=_client(request), method=request.method,
            path=request.url.path[:200], status=note.status, seconds=round(seconds, 4),
            **note.fields,
        )  # fmt: skip


def _client(request: HttpRequest) -> str | None:
    return None if request.client is None else request.client.host
