"""A small client of an OpenAI-compatible endpoint, as the terminal commands need it. Knows no terminal.

httpx is imported by the functions that use it, so that asking a command for help does not.
"""

import json
import os
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deployments.cli.errors import CommandError, ExitCode, one_line

if TYPE_CHECKING:
    import httpx

API_KEY_VARIABLE = "MANTA_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_SECONDS = 5.0
_MESSAGE_LIMIT = 500


class EndpointError(Exception):
    """The endpoint refused or broke off a request; the message is the endpoint's own where it gave one."""


def base_url(url: str) -> str:
    """The address without a trailing slash or "/v1". Raises CommandError unless it is an http or https address."""
    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise CommandError(f"--url {url}: {one_line(error)}", ExitCode.BAD_INPUT) from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise CommandError(f"--url {url}: expected an address such as {DEFAULT_URL}", ExitCode.BAD_INPUT)
    return url.rstrip("/").removesuffix("/v1")


def headers() -> dict[str, str]:
    """Request headers, with the API key of the environment if there is one."""
    key = os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def unreachable(url: str, error: Exception) -> CommandError:
    """What to tell a user whose endpoint does not answer."""
    return CommandError(f"cannot reach {url}: {one_line(error)}; is `manta serve` running there?")


def payload_of(line: str) -> dict[str, Any] | None:
    """The JSON object of one line of an event stream; None for `[DONE]` and for lines that carry no data.

    Raises EndpointError for an error that the endpoint reports inside the stream.
    """
    if not line.startswith("data:"):
        return None
    data = line[5:].strip()
    if data == "[DONE]":
        return None
    try:
        payload = json.loads(data)
    except ValueError:
        raise EndpointError(f"the stream holds something other than JSON: {data[:80]!r}") from None
    if not isinstance(payload, dict):
        raise EndpointError(f"the stream holds {type(payload).__name__}, expected an object")
    if "error" in payload:
        raise EndpointError(error_message(payload, "the endpoint broke off without a reason"))
    return payload


def error_message(body: Any, default: str) -> str:
    """The message of an OpenAI-style error body."""
    if isinstance(body, Mapping):
        error = body.get("error")
        if isinstance(error, Mapping) and isinstance(error.get("message"), str):
            return str(error["message"])[:_MESSAGE_LIMIT]
        if isinstance(error, str):
            return error[:_MESSAGE_LIMIT]
    return default


def refusal(status: int, body: bytes) -> EndpointError:
    """The error for a response that is not a success."""
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = None
    return EndpointError(f"HTTP {status}: {error_message(parsed, 'no reason given')}")


class Client:
    """One connection to an endpoint, used from one thread."""

    def __init__(self, url: str, *, transport: "httpx.BaseTransport | None" = None) -> None:
        import httpx

        self.url = base_url(url)
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        self._http = httpx.Client(base_url=self.url, headers=headers(), timeout=timeout, transport=transport)

    def model_names(self) -> list[str]:
        """Names of the served models. Raises EndpointError or, when nothing answers, CommandError."""
        import httpx

        try:
            response = self._http.get("/v1/models")
        except httpx.TransportError as error:
            raise unreachable(self.url, error) from None
        if response.status_code != 200:
            raise refusal(response.status_code, response.content)
        try:
            return [str(model["id"]) for model in response.json()["data"]]
        except (ValueError, KeyError, TypeError):
            raise EndpointError("/v1/models is not a list of models; is it an OpenAI-style server?") from None

    def choose_model(self, name: str | None) -> str:
        """The model to ask for: the given one, checked to be served, or the first served one."""
        names = self.model_names()
        if not names:
            raise EndpointError(f"{self.url} serves no model")
        if name is not None and name not in names:
            raise CommandError(f"--model {name}: {self.url} serves {', '.join(names)}", ExitCode.BAD_INPUT)
        return name or names[0]

    def chat(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> Generator[str]:
        """Pieces of the answer as they arrive. Closing the generator closes the stream, which ends the generation.

        Raises EndpointError, also when the stream ends before the answer does, and CommandError when nothing answers.
        """
        import httpx

        body = {**options, "messages": list(messages), "stream": True}
        finished = False
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise refusal(response.status_code, response.read())
                for line in response.iter_lines():
                    payload = payload_of(line)
                    for choice in (payload or {}).get("choices", ()):
                        finished = finished or choice.get("finish_reason") is not None
                        if text := choice.get("delta", {}).get("content"):
                            yield text
        except httpx.ConnectError as error:
            raise unreachable(self.url, error) from None
        except httpx.TransportError as error:
            raise EndpointError(f"the connection broke: {one_line(error)}") from None
        if not finished:
            raise EndpointError("the stream ended before the answer did")

    def close(self) -> None:
        self._http.close()
