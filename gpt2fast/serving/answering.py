"""What /v1/completions and /v1/chat/completions have in common: a plan carried out, and sent."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .body import Disconnected
from .choices import Answer, Choice, Delta
from .failures import json_response
from .planning import Plan
from .service import Service
from .streaming import EventStream, event, unless_left
from .submission import Submission


class Form(Protocol):
    """How choices are written."""

    prefix: str
    """Of an answer's id."""
    whole: str
    """The kind of object that an answer is."""
    piece: str
    """The kind of object that a piece of a stream is."""

    def choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """A choice that is done. `delta` is all of it."""

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """What comes first of a choice in a stream, or None."""

    def part(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """A part of a choice in a stream; the last one has the reason of the end."""


class Answering:
    """One answer, whole or in pieces.

    Args:
        service: the server.
        request: of HTTP.
        form: how choices are written.
        plan: what is asked for.
        fields: the request's.
    """

    def __init__(
        self,
        service: Service,
        request: HttpRequest,
        form: Form,
        plan: Plan,
        fields: dict[str, Any],
    ) -> None:
        self._service, self._request, self._form = service, request, form
        self._plan = plan
        self._note = request.state.note
        self._answer = Answer(plan, service.generator.tokenizer)
        self._usage = bool((fields["stream_options"] or {}).get("include_usage"))
        self._streams = fields["stream"]
        self._head = {
            "id": f"{form.prefix}-{secrets.token_hex(12)}",
            "object": form.piece if self._streams else form.whole,
            "created": int(time.time()),
            "model": service.name,
        }

    async def response(self) -> Response:
        """Carry the plan out.

        Raises:
            Refusal: the server is busy, or a job failed before an answer began.
            Disconnected: the client has left.
        """
        service = self._service
        if service.log_prompts:
            self._note.fields["prompts"] = [prompt.text for prompt in self._plan.prompts]
        submission = service.bridge.submit(self._plan.jobs)
        if self._streams:
            client = self._request.scope["client"]
            return EventStream(  # type: ignore[return-value]
                submission,
                self._pieces(submission),
                service.streams,
                lambda: service.connections.cut(client),
            )
        try:
            content = await unless_left(submission, self._request.receive, self._all(submission))
        finally:
            submission.cancel()
        if content is None:
            raise Disconnected
        return json_response(content)

    async def _all(self, submission: Submission) -> dict[str, Any]:
        while told := await submission.events():
            self._answer.take(told)
        choices = []
        for choice in self._answer.best():
            choices.append(self._form.choice(choice, choice.delta()))
        self._write_note()
        return {**self._head, "choices": choices, "usage": self._answer.usage()}

    async def _pieces(self, submission: Submission) -> AsyncIterator[bytes]:
        openings = map(self._form.opening, self._answer.all)
        if first := [self._piece(opening) for opening in openings if opening is not None]:
            yield b"".join(first)
        try:
            while told := await submission.events():
                pieces = []
                for choice in self._answer.take(told):
                    delta = choice.delta()
                    if (
                        delta.text
                        or delta.tokens
                        or choice.generation is not None
                        or (self._plan.token_ids and delta.ids)
                    ):
                        pieces.append(self._piece(self._form.part(choice, delta)))
                if pieces:
                    yield b"".join(pieces)
            if self._usage:
                yield event({**self._head, "choices": [], "usage": self._answer.usage()})
        finally:
            self._write_note()

    def _piece(self, choice: dict[str, Any]) -> bytes:
        content = {**self._head, "choices": [choice]}
        return event({**content, "usage": None} if self._usage else content)

    def _write_note(self) -> None:
        usage = self._answer.usage()
        self._note.fields.update(
            prompt_tokens=usage["prompt_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            new_tokens=usage["completion_tokens"],
            reasons=[
                choice.generation.finish_reason
                for choice in self._answer.all
                if choice.generation is not None
            ],
        )
        if self._service.log_prompts:
            self._note.fields["texts"] = [choice.text for choice in self._answer.all]
