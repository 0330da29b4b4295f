"""Errors as OpenAI's protocol has them: a status, and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from ..errors import Error, is_out_of_memory, printable, reason_of

INVALID = "invalid_request_error"
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_LONGEST = 1000
"""Characters of a message: an error is no way to have much sent back."""


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        message: names the value, the limit and the way out.
        status: of HTTP.
        param: the field that is wrong.
        code: a word for programs.
        headers: more headers of the answer.
        close: end the connection after the answer, as where its body was not read.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
    ) -> None:
        text = printable(message)
        super().__init__(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")
        self.status, self.param, self.code, self.close = status, param, code, close
        self.headers = dict(headers or {})

    @property
    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, INVALID if self.status < 500 else "server_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """The answer."""
        headers = {**self.headers, **({"connection": "close"} if self.close else {})}
        return Response(to_json(self.content), self.status, headers, media_type="application/json")


def overloaded(message: str, seconds: int) -> Refusal:
    """A request that may be tried again after some seconds."""
    return Refusal(
        message, 429, code="rate_limit_exceeded", headers={"retry-after": str(max(1, seconds))}
    )


def unavailable(message: str, seconds: int = 1) -> Refusal:
    """A request that another server, or this one later, may take."""
    return Refusal(message, 503, code="unavailable", headers={"retry-after": str(seconds)})


def refusal_of(error: BaseException, param: str | None = None) -> Refusal:
    """The answer to a request that ended in this exception."""
    if isinstance(error, Refusal):
        return error
    if is_out_of_memory(error):
        message = "out of memory: ask for fewer tokens or choices at once, or try again later"
        return Refusal(message, 503, code="out_of_memory", headers={"retry-after": "1"})
    if isinstance(error, Error):
        return Refusal(str(error), param=param)
    name = type(error).__name__
    return Refusal(f"the server failed ({name}); its log says more", 500, code="internal_error")


def failure_of(error: BaseException) -> Refusal:
    """The answer where a job that had been accepted failed: the fault is the server's."""
    found = refusal_of(error)
    if found.status >= 500:
        return found
    return Refusal(reason_of(error, _LONGEST), 500, code="generation_failed")


def json_response(content: Any) -> Response:
    """An answer of JSON."""
    return Response(to_json(content), media_type="application/json")


def to_json(content: Any) -> bytes:
    """JSON in ASCII: a text with half a surrogate pair can be written, too."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
