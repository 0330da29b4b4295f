"""Bodies of requests: read within limits of size and time, and parsed within limits of depth."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from starlette.requests import Request as HttpRequest

from .._system.parsing import MOST_VALUES, Unreadable, parse_json
from .failures import Refusal
from .fields import Structure
from .limits import Limits

_LINGER = 2.0
"""Seconds for which the rest of a refused body is read, so that its sender sees the answer."""


async def read_fields(request: HttpRequest, structure: Structure, limits: Limits) -> dict[str, Any]:
    """The checked fields of a request's JSON.

    Raises:
        Refusal: the body is too large, too slow, no JSON, or not what `structure` describes.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(
            f"the content-type is {kind[:80]!r}; it must be application/json", 415, close=True
        )
    content = await _read(request, limits)
    try:
        value = parse_json(content.decode("utf-8"), most_values=MOST_VALUES, finite=True)
    except UnicodeDecodeError as error:
        raise Refusal(
            f"the body is not UTF-8 (byte 0x{content[error.start]:02x} at {error.start})"
        ) from None
    except Unreadable as error:
        raise Refusal(f"the body cannot be read: {error}") from None
    return structure.check(value, "")


async def _read(request: HttpRequest, limits: Limits) -> bytes:
    most = limits.max_body
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > most):
        raise _too_large(f"{declared[:40]} bytes", most)
    end = time.monotonic() + limits.body_timeout
    parts, size = [], 0
    while True:
        message = await _receive(request, end)
        if message is None:
            raise Refusal(
                f"the body has not arrived within {limits.body_timeout:g} s (the server's "
                "body_timeout)",
                408,
                close=True,
            )
        if message["type"] == "http.disconnect":
            raise Disconnected
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _too_large(f"more than {size - 1} bytes", most)
        if not message.get("more_body", False):
            return b"".join(parts)


async def discard(request: HttpRequest) -> None:
    """Read for a moment what still comes of a body that has been refused."""
    end = time.monotonic() + _LINGER
    while (message := await _receive(request, end)) is not None:
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


async def _receive(request: HttpRequest, end: float) -> Any:
    """The next message of a request, or None if it has not come by `end`."""
    try:
        return await asyncio.wait_for(request.receive(), max(0.0, end - time.monotonic()))
    except asyncio.TimeoutError:
        return None


class Disconnected(Exception):
    """The client has gone; there is nobody to answer."""


def _too_large(size: str, most: int) -> Refusal:
    return Refusal(
        f"the body has {size}; {most} are the most (the server's max_body)", 413, close=True
    )
