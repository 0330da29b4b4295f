"""Answers that are sent piece by piece, as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from .failures import Refusal, to_json
from .gateway import Receive, Scope, Send
from .submission import Submission

DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(content) + b"\n\n"


class OpenStreams:
    """The answers that are being sent, so that no slow reader is waited for.

    Args:
        write_timeout: seconds that a client may leave a part unread.
    """

    def __init__(self, write_timeout: float) -> None:
        self._timeout = write_timeout
        self._all: set[EventStream] = set()

    def add(self, stream: EventStream) -> None:
        """A stream begins."""
        self._all.add(stream)

    def discard(self, stream: EventStream) -> None:
        """It has ended."""
        self._all.discard(stream)

    async def watch(self) -> None:
        """Cut the connections of clients that do not read, until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout / 4))
            now = time.monotonic()
            for stream in list(self._all):
                if stream.sends_since is not None and now - stream.sends_since > self._timeout:
                    stream.cut()


class EventStream:
    """A response of server-sent events.

    Args:
        submission: cancelled where the client leaves.
        pieces: bytes of one or more events, as they come; may end in a `Refusal`.
        streams: where the open ones are.
        cut: ends the connection at once.
    """

    def __init__(
        self,
        submission: Submission,
        pieces: AsyncIterator[bytes],
        streams: OpenStreams,
        cut: Any,
    ) -> None:
        self._submission, self._pieces, self._streams = submission, pieces, streams
        self._cut = cut
        self.sends_since: float | None = None
        """When the client was sent what it has not taken yet (time.monotonic)."""
        submission.cut = self.cut

    def cut(self) -> None:
        """End the connection without waiting for the client."""
        self._submission.cancel()
        self._cut()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(self._cancel_if_left(receive))
        self._streams.add(self)
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx passes each piece on at once
        ]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                async for piece in self._pieces:
                    await self._send(send, piece, True)
                last = DONE
            except Refusal as refusal:
                last = event(refusal.content)
            await self._send(send, last, False)
        finally:
            self._streams.discard(self)
            self._submission.cancel()
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

    async def _send(self, send: Send, body: bytes, more: bool) -> None:
        self.sends_since = time.monotonic()
        await send({"type": "http.response.body", "body": body, "more_body": more})
        self.sends_since = None

    async def _cancel_if_left(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._submission.stop(Refusal("the client has left", 499))


async def unless_left(submission: Submission, receive: Receive, answer: Any) -> Any:
    """The result of a coroutine, or None if the client leaves before."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else None
    finally:
        if not work.done():
            submission.cancel()
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
