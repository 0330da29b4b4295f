"""Connections: how many there may be, and how long they may take to send a request.

An ASGI application learns of a request when its headers are complete; what comes before is watched
here, by timers of asyncio's protocols.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from .failures import Refusal

Address = tuple[str, int]
_SPARE = 64
"""Connections beyond the limit that are told so; still further ones are cut."""


class Connections:
    """The open connections by the client's address and port.

    Args:
        most: of them.
        header_timeout: seconds until a connection has sent its first, or next, request's headers.
    """

    def __init__(self, most: int, header_timeout: float) -> None:
        self._most, self._header_timeout = most, header_timeout
        self._transports: dict[Address, asyncio.Transport] = {}
        self._timers: dict[Address, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._transports)

    @property
    def are_too_many(self) -> bool:
        """True if a request should be refused for the number of connections."""
        return len(self) > self._most

    def opened(self, transport: asyncio.Transport) -> None:
        """A client has connected."""
        address = address_of(transport)
        if address is None or len(self) >= self._most + _SPARE:
            transport.abort()
            return
        self._transports[address] = transport
        self.waits(address)

    def closed(self, transport: asyncio.Transport) -> None:
        """A connection has ended."""
        address = address_of(transport)
        if address is not None and self._transports.get(address) is transport:
            del self._transports[address]
            self.arrived(address)

    def waits(self, address: Address) -> None:
        """The next request of a connection is to begin."""
        transport = self._transports.get(address)
        if transport is not None:
            self.arrived(address)
            loop = asyncio.get_running_loop()
            self._timers[address] = loop.call_later(self._header_timeout, transport.abort)

    def arrived(self, address: Address) -> None:
        """A request's headers are complete."""
        timer = self._timers.pop(address, None)
        if timer is not None:
            timer.cancel()

    def cut(self, address: Address) -> None:
        """End a connection without waiting for what it has not read."""
        transport = self._transports.get(address)
        if transport is not None:
            transport.abort()


def address_of(transport: asyncio.Transport) -> Address | None:
    """The client's address and port, as uvicorn names them."""
    peer = transport.get_extra_info("peername")
    return None if not isinstance(peer, tuple) else (str(peer[0]), int(peer[1]))


def protocol_of(connections: Connections) -> type[H11Protocol]:
    """uvicorn's protocol, whose connections are watched by `connections`."""

    class WatchedProtocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            connections.opened(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            connections.closed(self.transport)
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            answer = Refusal(f"{msg} (or its headers are too long)", code="bad_http").response()
            lines = [b"HTTP/1.1 400 Bad Request", b"connection: close"]
            lines += [name + b": " + value for name, value in answer.raw_headers]
            if not self.transport.is_closing():
                self.transport.write(b"\r\n".join([*lines, b"", bytes(answer.body)]))
                self.transport.close()

    return WatchedProtocol
