"""The HTTP application over a `Backend`: routes, error handlers and the outermost layer, put together.

Knows no Ray: the Serve deployment around it is `deployments.gateway`, and the tests run it over a fake backend.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deployments.api import chat, completions, models
from deployments.api.connection import request_id_of
from deployments.api.edge import Edge
from deployments.api.errors import explain
from deployments.api.schema import Body, ChatRequest, CompletionRequest
from deployments.api.service import Service
from deployments.api.streams import Rewrite, Streams
from deployments.backend import Backend
from deployments.config import GatewayConfig
from deployments.streams.keeper import StreamKeeper
from deployments.text import TextModel
from monitoring.recorder import Recorder

_SCHEMAS = "#/components/schemas/"
_REWRITES: dict[str, Rewrite] = {chat.KIND: chat.rewrite_chat, completions.KIND: completions.rewrite_completion}
_Endpoint = Callable[[Request], Awaitable[Response]]


def build_http(
    backend: Backend,
    config: GatewayConfig,
    recorder: Recorder,
    version: str,
    *,
    load_text: Callable[[str], TextModel] = TextModel.load,
    echo_request_id: bool = True,
    keeper: StreamKeeper | None = None,
) -> FastAPI:
    """The application.

    `load_text` reads the tokenizer of the model directory that the backend's card names. `echo_request_id` is False
    behind a server that answers with X-Request-Id itself, as Ray Serve does: the header would come twice. `keeper`
    keeps streamed answers for clients that come back; without one they end with their connection.
    """
    service = Service(backend, config, recorder, load_text)
    streams = Streams(service, keeper if config.streams.grace_s > 0 else None, recorder, _REWRITES)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # A gateway without requests goes on with the streams of one that died.
        streams.start()
        yield

    description = "OpenAI-compatible language model serving"
    app = FastAPI(title="Manta", version=version, description=description, lifespan=lifespan)
    # Routing raises these inside; everything else reaches the outermost layer by itself.
    app.add_exception_handler(HTTPException, _on_http_exception)
    _add_generation_routes(app, service, streams)
    _add_status_routes(app, service, version)
    app.add_middleware(Edge, recorder=recorder, echo_request_id=echo_request_id)
    return app


def _add_generation_routes(app: FastAPI, service: Service, streams: Streams) -> None:
    async def create_chat_completion(request: Request) -> Response:
        return await chat.create_chat_completion(service, streams, request)

    async def create_completion(request: Request) -> Response:
        return await completions.create_completion(service, streams, request)

    async def resume_stream(request: Request) -> Response:
        return await streams.resume(request)

    _post(app, "/v1/chat/completions", create_chat_completion, ChatRequest)
    _post(app, "/v1/completions", create_completion, CompletionRequest)
    app.add_api_route("/v1/streams/{stream_id}", resume_stream, methods=["GET"], response_class=Response)
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
