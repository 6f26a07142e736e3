"""The HTTP application over a `Backend`: routes, error handlers and the outermost layer, put together.

Knows no Ray: the Serve deployment around it is `deployments.gateway`, and the tests run it over a fake backend.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deployments.api import models
from deployments.api.chat import create_chat_completion
from deployments.api.completions import create_completion
from deployments.api.connection import request_id_of
from deployments.api.edge import Edge
from deployments.api.errors import explain
from deployments.api.schema import Body, ChatRequest, CompletionRequest
from deployments.api.service import Service
from deployments.backend import Backend
from deployments.config import GatewayConfig
from deployments.text import TextModel
from monitoring.recorder import Recorder

_SCHEMAS = "#/components/schemas/"
_Endpoint = Callable[[Request], Awaitable[Response]]


def build_http(
    backend: Backend,
    config: GatewayConfig,
    recorder: Recorder,
    version: str,
    *,
    load_text: Callable[[str], TextModel] = TextModel.load,
    echo_request_id: bool = True,
) -> FastAPI:
    """The application.

    `load_text` reads the tokenizer of the model directory that the backend's card names. `echo_request_id` is False
    behind a server that answers with X-Request-Id itself, as Ray Serve does: the header would come twice.
    """
    service = Service(backend, config, recorder, load_text)
    app = FastAPI(title="Manta", version=version, description="OpenAI-compatible language model serving")
    # Routing raises these inside; everything else reaches the outermost layer by itself.
    app.add_exception_handler(HTTPException, _on_http_exception)
    _add_generation_routes(app, service)
    _add_status_routes(app, service, version)
    app.add_middleware(Edge, recorder=recorder, echo_request_id=echo_request_id)
    return app


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(service, request)

    async def completions(request: Request) -> Response:
        return await create_completion(service, request)

    _post(app, "/v1/chat/completions", chat_completions, ChatRequest)
    _post(app, "/v1/completions", completions, CompletionRequest)
    _document(app, ChatRequest, CompletionRequest)


def _add_status_routes(app: FastAPI, service: Service, version: str) -> None:
    async def list_models(request: Request) -> Response:
        return await models.list_models(service)

    async def get_model(request: Request) -> Response:
        return await models.get_model(service, request.path_params["name"])

    async def health(request: Request) -> Response:
        return await models.health(service)

    async def metrics(request: Request) -> Response:
        return await models.metrics(service)

    async def live(request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def show_version(request: Request) -> Response:
        return JSONResponse({"version": version})

    _get(app, "/v1/models", list_models)
    _get(app, "/v1/models/{name:path}", get_model)
    for path, endpoint in (
        ("/health", health),
        ("/ready", health),
        ("/live", live),
        ("/version", show_version),
        ("/metrics", metrics),
    ):
        _get(app, path, endpoint)


def _get(app: FastAPI, path: str, endpoint: _Endpoint) -> None:
    app.add_api_route(path, endpoint, methods=["GET"], response_class=Response)
    app.add_api_route(path, endpoint, methods=["HEAD"], response_class=Response, include_in_schema=False)


def _post(app: FastAPI, path: str, endpoint: _Endpoint, body: type[Body]) -> None:
    # The body is read and validated by the endpoint, so that errors are in OpenAI's format and not in FastAPI's; the
    # documentation is told its schema.
    content = {"application/json": {"schema": {"$ref": _SCHEMAS + body.__name__}}}
    documented = {"requestBody": {"required": True, "content": content}}
    app.add_api_route(path, endpoint, methods=["POST"], response_class=Response, openapi_extra=documented)


def _document(app: FastAPI, *bodies: type[Body]) -> None:
    """Adds the bodies' schemas to the application's OpenAPI document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        _, found = models_json_schema([(body, "validation") for body in bodies], ref_template=_SCHEMAS + "{model}")
        document.setdefault("components", {}).setdefault("schemas", {}).update(found["$defs"])
        return document

    app.openapi = openapi  # type: ignore[method-assign]


async def _on_http_exception(request: Request, error: Exception) -> Response:
    response = explain(error, request_id_of(request.scope)).response()
    if response.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers={"Allow": response.headers.get("allow", "")})
    return response
