"""The OpenAPI description, made of the fields that requests are checked by."""

from __future__ import annotations

from typing import Any

from .. import __version__
from .fields import Schema, Structure
from .service import Service
from .status import BASE_MODEL

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_IDS: Schema = {"type": "array", "items": _COUNT}
_LOGPROB: Schema = {"type": ["number", "null"], "maximum": 0}


def _object(properties: dict[str, Schema], *optional: str) -> Schema:
    """An object with these fields and no others."""
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_ERROR = _object(
    {
        "error": _object(
            {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            }
        )
    }
)
_USAGE = _object(
    {
        "prompt_tokens": _COUNT,
        "completion_tokens": _COUNT,
        "total_tokens": _COUNT,
        "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
    }
)
_REASONS: dict[str, Schema] = {
    "finish_reason": {"enum": ["stop", "length", None]},
    "stop_reason": {
        "type": ["string", "integer", "null"],
        "description": "The stop text, or the token of stop_token_ids, that ended the choice; "
        '"time" where a limit of time did.',
    },
}
_COMPLETION_LOGPROBS = _object(
    {
        "text_offset": _IDS,
        "token_logprobs": _list(_LOGPROB),
        "tokens": _list(_TEXT),
        "top_logprobs": _list(_nullable({"type": "object", "additionalProperties": _LOGPROB})),
    }
)
_ALTERNATIVE: dict[str, Schema] = {"token": _TEXT, "logprob": _LOGPROB, "bytes": _IDS}
_CHAT_LOGPROBS = _object(
    {
        "content": _list(_object({**_ALTERNATIVE, "top_logprobs": _list(_object(_ALTERNATIVE))})),
        "refusal": {"type": "null"},
    }
)
_TOKEN_IDS: dict[str, Schema] = {"token_ids": _IDS, "prompt_token_ids": _IDS}


def _answer(kind: str, choice: Schema) -> Schema:
    return _object(
        {
            "id": _TEXT,
            "object": {"const": kind},
            "created": _COUNT,
            "model": _TEXT,
            "choices": _list(choice),
            "usage": _USAGE,
        }
    )


_COMPLETION = _answer(
    "text_completion",
    _object(
        {
            "index": _COUNT,
            "text": _TEXT,
            "logprobs": _nullable(_COMPLETION_LOGPROBS),
            **_REASONS,
            **_TOKEN_IDS,
        },
        *_TOKEN_IDS,
    ),
)
_MESSAGE = _object({"role": {"const": "assistant"}, "content": _TEXT, "refusal": {"type": "null"}})
_CHAT = _answer(
    "chat.completion",
    _object(
        {
            "index": _COUNT,
            "message": _MESSAGE,
            "logprobs": _nullable(_CHAT_LOGPROBS),
            **_REASONS,
            **_TOKEN_IDS,
        },
        *_TOKEN_IDS,
    ),
)
_EMBEDDINGS = _object(
    {
        "object": {"const": "list"},
        "data": _list(
            _object(
                {
                    "object": {"const": "embedding"},
                    "index": _COUNT,
                    "embedding": {"anyOf": [_list({"type": "number"}), _TEXT]},
                }
            )
        ),
        "model": _TEXT,
        "usage": _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
    }
)
_MODEL = _object(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _TEXT,
        "max_model_len": _COUNT,
        "description": _TEXT,
    }
)
_MODELS = _object({"object": {"const": "list"}, "data": _list(_MODEL)})
_ATTENTION = _object(
    {
        "tokens": _list(_TEXT),
        "weights": _list(_list({"type": "number", "minimum": 0, "maximum": 1})),
        "layers": _COUNT,
        "heads": _COUNT,
    }
)
_MAYBE: Schema = {"type": ["string", "null"]}
_TOKENIZER = _object(
    {
        "tokenizer_class": _TEXT,
        "eos_token": _MAYBE,
        "bos_token": _MAYBE,
        "pad_token": _MAYBE,
        "model_max_length": _COUNT,
    }
)
_STATE = _object({"status": _TEXT})

_ALWAYS = (403, 429, 503)
_OF_BODIES = (400, 404, 408, 413, 415, 500)
_ABOUT = {
    400: "The request is wrong; the message says what and how to change it.",
    401: "The API key is missing or wrong.",
    403: "The header Host names another server.",
    404: "There is no such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "The server failed.",
    501: "This server cannot do that, as it was started.",
    503: "The server is full or shutting down.",
}


def describe(service: Service, has_keys: bool) -> dict[str, Any]:
    """The description of a server.

    Args:
        service: whose limits are in it.
        has_keys: it asks for a key.
    """
    parameters = service.parameters

    def post(about: str, body: Structure, answer: Schema, streams: bool = False) -> Schema:
        content: dict[str, Any] = {"application/json": {"schema": answer}}
        if streams:
            content["text/event-stream"] = {"schema": _TEXT}
        found = {
            "summary": about,
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": body.schema()}},
            },
            "responses": {
                "200": {"description": "The answer.", "content": content},
                **_errors(*_OF_BODIES, *_ALWAYS, *((501,) if answer is _EMBEDDINGS else ())),
            },
        }
        return {"post": found}

    def get(about: str, answer: Schema, *errors: int, kind: str = "application/json") -> Schema:
        content = {kind: {"schema": answer}}
        responses = {
            "200": {"description": "The answer.", "content": content},
            **_errors(*errors, *_ALWAYS),
        }
        return {"get": {"summary": about, "responses": responses}}

    def _errors(*statuses: int) -> dict[str, Schema]:
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        every = (*statuses, *((401,) if has_keys else ()))
        return {
            str(status): {"description": _ABOUT[status], "content": content}
            for status in sorted(every)
        }

    by_name = get("The model by its name.", _MODEL, 404)
    by_name["get"]["parameters"] = [
        {"name": "name", "in": "path", "required": True, "schema": _TEXT}
    ]
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "gpt2fast",
            "version": __version__,
            "description": f"OpenAI's protocol for {service.name}. {BASE_MODEL}",
        },
        "paths": {
            "/v1/completions": post("Continue texts.", parameters.completion, _COMPLETION, True),
            "/v1/chat/completions": post("Continue a conversation.", parameters.chat, _CHAT, True),
            "/v1/embeddings": post("Vectors of texts.", parameters.embedding, _EMBEDDINGS),
            "/v1/models": get("The list of models.", _MODELS),
            "/v1/models/{name}": by_name,
            "/tokenize": post(
                "Token ids of a text.",
                parameters.tokenize,
                _object({"count": _COUNT, "max_model_len": _COUNT, "tokens": _IDS}),
            ),
            "/detokenize": post(
                "Text of token ids.", parameters.detokenize, _object({"prompt": _TEXT})
            ),
            "/tokenizer_info": get("The special tokens.", _TOKENIZER),
            "/attention": post("What tokens look at.", parameters.attention, _ATTENTION),
            "/health": get("Whether the server lives.", _STATE, 500),
            "/ready": get("Whether the server takes requests.", _STATE, 500),
            "/version": get("The version of gpt2fast.", _object({"version": _TEXT})),
            "/metrics": get("Counters for Prometheus.", _TEXT, kind="text/plain"),
        },
        "components": {"schemas": {"Error": _ERROR}},
    }
    if has_keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        for path in ("/health", "/ready"):
            found["paths"][path]["get"]["security"] = []
    return found
