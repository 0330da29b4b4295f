"""POST /v1/completions."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .answering import Answering
from .body import read_fields
from .choices import Choice, Delta, TokenNames, completion_logprobs
from .failures import Refusal
from .planning import Plan
from .service import Service

_USUAL_TOKENS = 16
"""New tokens where a request does not say, as in OpenAI's API."""


async def completions(service: Service, request: HttpRequest) -> Response:
    """Continue texts."""
    fields = await read_fields(request, service.parameters.completion, service.limits)
    service.check_model(fields["model"])
    if fields["max_tokens"] == 0 and fields["stream"]:
        raise Refusal(
            "max_tokens is 0 and stream is true: there is nothing to send piece by piece; leave "
            "out stream",
            param="stream",
        )
    prompts = await service.planner.prompts(fields["prompt"], "prompt")
    plan = await service.planner.plan(
        prompts,
        fields,
        max_tokens=fields["max_tokens"],
        usual=_USUAL_TOKENS,
        name="prompt",
        alternatives=fields["logprobs"],
        deadline=time.monotonic() + service.limits.request_timeout,
    )
    return await Answering(service, request, _Form(plan, service.names), plan, fields).response()


class _Form:
    """Choices of /v1/completions."""

    prefix = "cmpl"
    whole = piece = "text_completion"

    def __init__(self, plan: Plan, names: TokenNames) -> None:
        self._plan, self._names = plan, names
        self._has_ids: set[int] = set()

    def choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """A choice that is done."""
        return self.part(choice, delta)

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """Nothing: the first part says everything."""
        return None

    def part(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """A part of a choice."""
        scored = self._plan.alternatives is not None
        found: dict[str, Any] = {
            "index": choice.index,
            "text": delta.text,
            "logprobs": completion_logprobs(delta.tokens, self._names) if scored else None,
            "finish_reason": choice.reason,
            "stop_reason": choice.stop_reason,
        }
        if self._plan.token_ids:
            found["token_ids"] = delta.ids
            if choice.index not in self._has_ids:
                self._has_ids.add(choice.index)
                found["prompt_token_ids"] = choice.prompt.tokens
        return found
