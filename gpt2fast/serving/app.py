"""The ASGI application: which path is answered by what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ..errors import shown
from . import status, tokens
from .chat import chat
from .completions import completions
from .embeddings import Embedder
from .failures import Refusal, json_response
from .gateway import Access, Gateway
from .openapi import describe
from .service import Service

PAGE = Path(__file__).parent / "page"
_POLICY = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # or a browser keeps the page of an older version
}
"""Headers of the page: it loads nothing from elsewhere, and stands in no other page."""

Answer = Callable[[HttpRequest], Awaitable[Response]]


def create_app(
    service: Service, access: Access | None = None, origins: tuple[str, ...] = ()
) -> Starlette:
    """The application, which starts and ends the engine with itself.

    Args:
        service: what it serves.
        access: who is let in; None lets in all programs of this computer.
        origins: pages of other origins that may read answers; "*" stands for all.
    """
    access = access or Access()
    posts: dict[str, Answer] = {
        "/v1/completions": partial(completions, service),
        "/v1/chat/completions": partial(chat, service),
        "/v1/embeddings": Embedder(service).answer,
        "/tokenize": partial(tokens.tokenize, service),
        "/detokenize": partial(tokens.detokenize, service),
        "/attention": partial(tokens.attention, service),
    }
    description = describe(service, bool(access.keys))

    async def openapi(request: HttpRequest) -> Response:
        return json_response(description)

    gets: dict[str, Answer] = {
        "/v1/models": partial(status.models, service),
        "/v1/models/{name:path}": partial(status.model, service),
        "/tokenizer_info": partial(tokens.tokenizer_info, service),
        "/health": partial(status.health, service),
        "/ready": partial(status.ready, service),
        "/version": partial(status.version, service),
        "/metrics": partial(status.metrics, service),
        "/openapi.json": openapi,
        "/": _page,
    }
    routes: list[Any] = [Route(path, answer, methods=["POST"]) for path, answer in posts.items()]
    routes += [Route(path, answer, methods=["GET"]) for path, answer in gets.items()]
    routes.append(Mount("/static", _Files(directory=PAGE)))
    middleware = [
        Middleware(
            Gateway,
            access=access,
            connections=service.connections,
            metrics=service.metrics,
            endpoints=frozenset([*posts, *gets]),
            is_draining=lambda: service.is_draining,
        )
    ]
    if origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
        middleware.insert(0, cors)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        watch = asyncio.ensure_future(service.streams.watch())
        try:
            yield
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
            await asyncio.to_thread(service.engine.close)
            service.pool.shutdown(cancel_futures=True)

    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )


async def _page(request: HttpRequest) -> Response:
    return FileResponse(PAGE / "index.html", headers=_POLICY)


class _Files(StaticFiles):
    """The page's files, with its headers."""

    def file_response(self, *arguments: Any, **settings: Any) -> Response:
        response = super().file_response(*arguments, **settings)
        response.headers.update(_POLICY)
        return response


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """Starlette's own errors (no such path, a wrong method) in the form of all others."""
    assert isinstance(error, HTTPException)
    path, method = shown(request.url.path), request.method
    if error.status_code == 404:
        text = f"there is nothing at {path}; /openapi.json lists what there is"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        text = f"{method[:20]} is not a method of {path}; use {allowed}"
    else:
        text = str(error.detail)
    return Refusal(text, error.status_code, headers=error.headers).response()
