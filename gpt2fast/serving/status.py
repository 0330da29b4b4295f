"""What a server says about itself: its model, health, version, counters and description."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .. import __version__
from .failures import Refusal, json_response, unavailable
from .metrics import CONTENT_TYPE
from .service import Service

BASE_MODEL = (
    "A base model: it continues texts, and was not trained to answer or to follow instructions. "
    "Conversations reach it as one plain text."
)


async def models(service: Service, request: HttpRequest) -> Response:
    """The list of models, which has one."""
    return json_response({"object": "list", "data": [_card(service)]})


async def model(service: Service, request: HttpRequest) -> Response:
    """The model by its name."""
    service.check_model(request.path_params["name"])
    return json_response(_card(service))


async def health(service: Service, request: HttpRequest) -> Response:
    """200 as long as requests can be answered at all."""
    if not service.engine.started:
        raise Refusal("the engine has ended", 500, code="internal_error")
    return json_response({"status": "ok"})


async def ready(service: Service, request: HttpRequest) -> Response:
    """200 if new requests are welcome: the queue is not full, and the server not about to end."""
    if service.is_draining:
        raise unavailable("the server is shutting down")
    if not service.engine.started:
        raise Refusal("the engine has ended", 500, code="internal_error")
    if service.engine.stats().waiting >= service.limits.max_queue:
        raise unavailable("the queue is full")
    return json_response({"status": "ready"})


async def version(service: Service, request: HttpRequest) -> Response:
    """The version of gpt2fast."""
    return json_response({"version": __version__})


async def metrics(service: Service, request: HttpRequest) -> Response:
    """Counters for Prometheus."""
    return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _card(service: Service) -> dict[str, object]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "gpt2fast",
        "max_model_len": service.positions,
        "description": BASE_MODEL,
    }
