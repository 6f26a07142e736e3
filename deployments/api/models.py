"""GET /v1/models and the routes that tell how the server is: /health, /ready, /live, /version, /metrics."""

import asyncio
from typing import Any

from starlette.responses import JSONResponse, Response

from deployments.api.errors import ApiError
from deployments.api.service import Service
from deployments.backend import NotReady
from deployments.messages import ModelCard
from engine.errors import ModelError

HEALTH_SECONDS = 5.0
"""A backend that has not answered by then counts as unreachable."""
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def model_json(card: ModelCard) -> dict[str, Any]:
    """OpenAI's model object, with vLLM's `max_model_len`."""
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "manta",
        "max_model_len": card.max_model_len,
    }


async def list_models(service: Service) -> Response:
    """Raises NotReady while no replica has loaded the model."""
    card = (await service.served()).card
    return JSONResponse({"object": "list", "data": [model_json(card)]})


async def get_model(service: Service, name: str) -> Response:
    """Raises ApiError 404 for a model that is not served."""
    return JSONResponse(model_json((await service.model(name)).card))


async def health(service: Service) -> Response:
    """200 when a request sent now would be served, else 503 with the reason."""
    try:
        async with asyncio.timeout(HEALTH_SECONDS):
            ready = await service.ready()
    except NotReady as error:
        raise _unready(str(error)) from error
    except TimeoutError as error:
        raise _unready(f"the backend did not answer within {HEALTH_SECONDS:g} s") from error
    except ModelError as error:
        raise _unready(str(error)) from error
    if not ready:
        raise _unready("")
    return JSONResponse({"status": "ready"})


async def metrics(service: Service) -> Response:
    """The application's metrics for Prometheus."""
    return Response(await service.backend.metrics(), media_type=METRICS_TYPE)


def _unready(reason: str) -> ApiError:
    message = reason or "no replica has loaded the model yet"
    return ApiError(503, message, kind="server_error", code="not_ready", headers={"Retry-After": "1"})
