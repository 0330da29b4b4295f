"""POST /v1/chat/completions: a conversation as one plain text, since GPT-2 is a base model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .answering import Answering
from .body import read_fields
from .choices import Choice, Delta, TokenNames, chat_logprobs
from .failures import Refusal
from .planning import Plan
from .service import Service

STOPS = ("\nUser:", "\nSystem:")
"""Texts that end an answer: the model has begun to speak for somebody else."""
_NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


def as_text(messages: Sequence[dict[str, Any]]) -> str:
    """A conversation as a text to continue: a paragraph `Name: content` for each message.

    It ends with `Assistant:`, or within the last message if that is the assistant's, which then
    goes on.
    """
    paragraphs = [f"{_NAMES[each['role']]}: {each['content']}".rstrip() for each in messages]
    if messages[-1]["role"] != "assistant":
        paragraphs.append("Assistant:")
    return "\n\n".join(paragraphs)


async def chat(service: Service, request: HttpRequest) -> Response:
    """Continue a conversation."""
    fields = await read_fields(request, service.parameters.chat, service.limits)
    service.check_model(fields["model"])
    if fields["top_logprobs"] and not fields["logprobs"]:
        raise Refusal(
            f"top_logprobs is {fields['top_logprobs']}, and logprobs is not true: add it",
            param="top_logprobs",
        )
    most = fields["max_completion_tokens"]
    if most is None:
        most = fields["max_tokens"]
    prompts = await service.planner.prompts([as_text(fields["messages"])], "messages")
    plan = await service.planner.plan(
        prompts,
        fields,
        max_tokens=most,
        usual=service.parameters.max_tokens,
        name="messages",
        alternatives=(fields["top_logprobs"] or 0) if fields["logprobs"] else None,
        deadline=time.monotonic() + service.limits.request_timeout,
        stops=STOPS,
    )
    return await Answering(service, request, _Form(plan, service.names), plan, fields).response()


class _Form:
    """Choices of /v1/chat/completions."""

    prefix, whole, piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, plan: Plan, names: TokenNames) -> None:
        self._plan, self._names = plan, names

    def choice(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """A choice that is done."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return self._with_rest({"index": choice.index, "message": message}, choice, delta)

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """Who speaks."""
        found: dict[str, Any] = {
            "index": choice.index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        if self._plan.token_ids:
            found["prompt_token_ids"] = choice.prompt.tokens
        return found

    def part(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """A part of a choice."""
        content = {"content": delta.text} if delta.text else {}
        return self._with_rest({"index": choice.index, "delta": content}, choice, delta)

    def _with_rest(self, found: dict[str, Any], choice: Choice, delta: Delta) -> dict[str, Any]:
        scored = self._plan.alternatives is not None
        found["logprobs"] = chat_logprobs(delta.tokens, self._names) if scored else None
        found["finish_reason"] = choice.reason
        found["stop_reason"] = choice.stop_reason
        if self._plan.token_ids:
            found["token_ids"] = delta.ids
            if "message" in found:
                found["prompt_token_ids"] = choice.prompt.tokens
        return found
