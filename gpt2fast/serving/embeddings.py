"""POST /v1/embeddings: vectors of texts, from the model's last hidden states."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import torch
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from torch import Tensor

from ..inference.reading import embed_texts
from ..model import GPT2
from .body import read_fields
from .failures import Refusal, json_response, overloaded
from .service import Service

_WAITING = 16
"""Requests that may wait for the one that is read."""


class Embedder:
    """Answers one request after the other, in a thread.

    Args:
        service: the server.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._turn: asyncio.Lock | None = None
        self._waiting = 0

    async def answer(self, request: HttpRequest) -> Response:
        """Read texts."""
        service = self._service
        fields = await read_fields(request, service.parameters.embedding, service.limits)
        service.check_model(fields["model"])
        if not isinstance(service.generator.model, GPT2):
            raise Refusal(
                "this server's model is quantized, or was started with --no-embeddings: packed "
                "weights have no hidden states to read",
                501,
                code="unsupported",
            )
        prompts = await service.planner.prompts(fields["input"], "input")
        if any(prompt.unwritten for prompt in prompts):
            raise Refusal("input has an empty text: leave it out", param="input")
        texts = [prompt.tokens for prompt in prompts]
        vectors = await self._read(texts, fields["pooling"])
        tokens = sum(map(len, texts))
        request.state.note.fields["prompt_tokens"] = tokens
        as_text = fields["encoding_format"] == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": _written(vector, as_text)}
            for index, vector in enumerate(vectors)
        ]
        content = {
            "object": "list",
            "data": data,
            "model": service.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return json_response(content)

    async def _read(self, texts: list[list[int]], pooling: str) -> Tensor:
        """(N, width) vectors of length 1, as OpenAI's are."""
        if self._turn is None:
            self._turn = asyncio.Lock()
        if self._waiting >= _WAITING:
            raise overloaded(f"{_WAITING} requests for embeddings wait already", 1)
        self._waiting += 1
        try:
            async with self._turn:
                model = self._service.generator.model
                vectors = await self._service.planner.in_thread(embed_texts, model, texts, pooling)
        finally:
            self._waiting -= 1
        return torch.nn.functional.normalize(vectors, dim=-1)


def _written(vector: Tensor, as_text: bool) -> Any:
    if as_text:
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    return vector.tolist()
