"""The server as a process: its sockets, and an end that loses no answer that can be finished."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from ..errors import Error, reason_of
from . import logs
from .app import create_app
from .connections import protocol_of
from .failures import unavailable
from .gateway import Access
from .service import Service
from .submission import Submission

_BACKLOG = 512
_LAST = 5.0
"""Seconds beyond the grace for the last words to be sent."""


def serve(
    service: Service,
    sockets: list[socket.socket],
    *,
    access: Access,
    origins: tuple[str, ...] = (),
    grace: float = 30.0,
    announce: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal ends it: SIGTERM or SIGINT, and SIGINT again for at once.

    Args:
        service: what to serve.
        sockets: those of `bind`.
        access: who is let in.
        origins: pages of other origins that may read answers.
        grace: seconds for running requests to end after the signal.
        announce: called when requests can come.
    """
    app = create_app(service, access, origins)
    config = uvicorn.Config(
        app,
        http=protocol_of(service.connections),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # the address of a connection is the one that it comes from
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=max(1, int(service.limits.header_timeout)),
        timeout_graceful_shutdown=int(grace + _LAST),
    )
    _Server(config, service, grace, announce).run(sockets)


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets at all addresses of a name; nobody can connect before `serve` runs.

    Args:
        host: name or address.
        port: 0 takes one that is free.

    Raises:
        Error: there is no such address here, or the port is taken.
    """
    found: list[socket.socket] = []
    try:
        kinds = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(kinds):
            # asyncio sends small pieces at once if the socket says that it is TCP's.
            each = socket.socket(family, kind, protocol)
            found.append(each)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            each.bind((address[0], port, *address[2:]))
            port = found[0].getsockname()[1]
    except (OSError, OverflowError, UnicodeError) as error:
        for each in found:
            each.close()
        raise Error(
            f"cannot listen at {host}, port {port}: {reason_of(error)}; choose others with --host "
            "and --port"
        ) from None
    return found


class _Server(uvicorn.Server):
    """uvicorn's server, which after a signal goes on with what has begun for `grace` seconds."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        grace: float,
        announce: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._service, self._grace, self._announce = service, grace, announce
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._announce()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own raises the signal again at the end, which would be an exit code of its own.
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        elif not self.should_exit:
            self.should_exit = True
            self._service.is_draining = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._drain, signal.Signals(sig).name)

    def _drain(self, name: str) -> None:
        logs.record("draining", signal=name, grace=self._grace, running=len(self._open))
        asyncio.get_running_loop().call_later(self._grace, self._give_up)

    def _give_up(self) -> None:
        for submission in list(self._open):
            submission.stop(unavailable("the server shut down before the answer was complete"))

    @property
    def _open(self) -> set[Submission]:
        return self._service.bridge.open
