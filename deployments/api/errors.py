"""Every failure as OpenAI reports it: `{"error": {"message", "type", "param", "code"}}` and a status.

The one place that maps exceptions to HTTP. Messages never hold a traceback, and what they echo of a client's input is
cut.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from deployments.backend import GenerationFailed, ModelGone, NotReady
from engine.errors import ContextLengthExceeded, InvalidRequest

log = logging.getLogger(__name__)

MAX_MESSAGE = 1000
MAX_ECHO = 80


class ApiError(Exception):
    """A failure with its HTTP status and OpenAI's words for it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON object `{"error": ...}`."""
        message = self.message if len(self.message) <= MAX_MESSAGE else self.message[:MAX_MESSAGE] + "..."
        error = {"message": message, "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, headers=self.headers, media_type="application/json")


class ClientDisconnected(Exception):
    """The client went away: nobody is left to be told anything."""


def describe(error: BaseException) -> ApiError | None:
    """The client's view of an exception, or None for one that is a defect of ours."""
    match error:
        case ApiError():
            return error
        case ContextLengthExceeded():
            return ApiError(400, error.message, param=error.param, code="context_length_exceeded")
        case InvalidRequest():
            return ApiError(400, error.message, param=error.param, code=error.code)
        case ValidationError():
            return _invalid_body(error)
        case NotReady():
            message = str(error) or "the model is not ready to serve"
            return ApiError(503, message, kind="server_error", code="not_ready", headers={"Retry-After": "1"})
        case ModelGone():
            # Before the first token another try is for the model that is served now; later on there is no status.
            return ApiError(503, str(error), kind="server_error", code="model_gone", headers={"Retry-After": "1"})
        case GenerationFailed():
            return ApiError(500, str(error) or "the generation failed", kind="server_error", code="generation_failed")
        case HTTPException():
            return _http_error(error)
        case ClientDisconnected():
            return ApiError(499, "the client closed the connection")
    return None


def internal_error(request_id: str) -> ApiError:
    """What a client is told about a defect: only where to find it in the log."""
    return ApiError(500, f"internal error; the server's log has it under request {request_id}", kind="server_error")


def quote(value: object) -> str:
    """A client's value, short enough to be sent back."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text if len(text) <= MAX_ECHO else text[:MAX_ECHO] + "...")


def param_path(location: Sequence[int | str]) -> str | None:
    """A field as OpenAI names it: `messages[0].role`."""
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step[:MAX_ECHO]}" if path else step[:MAX_ECHO]
    return path or None


def _invalid_body(invalid: ValidationError) -> ApiError:
    first = invalid.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the request body is not valid JSON: {first['ctx']['error']}")
    location = [step for step in first["loc"] if step != "[key]"]  # pydantic's mark of a bad key rather than value
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequest):  # Raised by a validator of a whole object, so it names the field itself.
        param = param_path([*location, cause.param] if cause.param else location)
        return ApiError(400, cause.message, param=param, code=cause.code)
    param = param_path(location)
    if first["type"] == "missing":
        return ApiError(400, f"you must provide {param}", param=param, code="missing_required_parameter")
    what = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param or 'the request body'}: {what}{_got(first)}", param=param, code="invalid_value")


def _got(error: Mapping[str, Any]) -> str:
    """The offending value, where it is short and says something; validators of ours name it themselves."""
    value = error["input"]
    if error["type"] == "value_error" or isinstance(value, dict | list) or value is None:
        return ""
    return f", got {quote(value)}"


def _http_error(error: HTTPException) -> ApiError:
    headers = error.headers
    if error.status_code == 404:
        message = "no such route; this server has /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics"
        return ApiError(404, message, code="unknown_url")
    if error.status_code == 405:
        return ApiError(405, "this route does not take this method", code="method_not_allowed", headers=headers)
    return ApiError(error.status_code, str(error.detail), headers=headers)


def explain(error: BaseException, request_id: str) -> ApiError:
    """What a client is told about any exception; defects are logged, with their traceback, and not told."""
    described = describe(error)
    if described is None:
        log.error("request %s failed", request_id, exc_info=error)
        return internal_error(request_id)
    return described
