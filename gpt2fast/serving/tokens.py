"""/tokenize, /detokenize, /tokenizer_info and /attention: tokens, and what each looked at."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..errors import TokenizerError
from .attention import attention_response
from .body import read_fields
from .failures import Refusal, json_response, refusal_of
from .service import Service


async def tokenize(service: Service, request: HttpRequest) -> Response:
    """The token ids of a text."""
    fields = await read_fields(request, service.parameters.tokenize, service.limits)
    service.check_model(fields["model"])
    try:
        ids = await service.planner.encode(fields["prompt"], fields["add_special_tokens"])
    except TokenizerError as error:
        raise refusal_of(error, "prompt") from None
    return json_response({"count": len(ids), "max_model_len": service.positions, "tokens": ids})


async def detokenize(service: Service, request: HttpRequest) -> Response:
    """The text of token ids."""
    fields = await read_fields(request, service.parameters.detokenize, service.limits)
    service.check_model(fields["model"])
    try:
        text = service.generator.tokenizer.decode(fields["tokens"])
    except TokenizerError as error:
        raise refusal_of(error, "tokens") from None
    return json_response({"prompt": text})


async def tokenizer_info(service: Service, request: HttpRequest) -> Response:
    """The special tokens, for clients that have no tokenizer of their own (lm_eval's "remote")."""
    tokenizer = service.generator.tokenizer

    def text(id: int | None) -> str | None:
        return None if id is None else tokenizer.decode([id])

    return json_response(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "eos_token": text(tokenizer.eos_token_id),
            "bos_token": text(tokenizer.start_token_id),
            "pad_token": None,
            "model_max_length": service.positions,
        }
    )


async def attention(service: Service, request: HttpRequest) -> Response:
    """The attention weights of one head, for the page."""
    fields = await read_fields(request, service.parameters.attention, service.limits)
    tokens = fields["tokens"]
    if (tokens is None) == (fields["prompt"] is None):
        raise Refusal("give prompt or tokens, and not both", param="prompt")
    if tokens is None:
        (prompt,) = await service.planner.prompts([fields["prompt"]], "prompt")
        tokens = prompt.tokens
    generator = service.generator
    return json_response(
        await service.planner.in_thread(
            attention_response, generator.model, generator.tokenizer, tokens,
            fields["layer"], fields["head"],
        )
    )  # fmt: skip
