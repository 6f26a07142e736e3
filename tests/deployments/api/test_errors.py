"""Bad input: what a client that made a mistake is told. The status, the type and the field are the contract."""

import json
from typing import Any

import httpx
import pytest

from deployments.backend import GenerationFailed, NotReady
from engine.errors import InvalidRequest
from tests.deployments.api.tiny import MAX_MODEL_LEN

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **changes}


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi", **changes}


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return body["error"]


BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "42"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"n": 1000}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_completion_tokens": MAX_MODEL_LEN}, "max_completion_tokens"),
    ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"allowed_token_ids": [99999]}, "allowed_token_ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [99999]}, "stop_token_ids"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"model": None}, "model"),
]


@pytest.mark.parametrize(("change", "param"), BAD_CHATS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_chat_parameter_is_named_before_anything_is_sent(client, backend, change, param, stream):
    if stream and "stream_options" in change:
        return
    response = await client.post(CHAT, content=json.dumps({**chat(stream=stream), **change}))
    assert response.status_code == 400
    error = error_of(response)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert backend.requests == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["hi", ""]}, "prompt[1]"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [[1], [99999]]}, "prompt[1]"),
        ({"prompt": {"text": "hi"}}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 100}, "n"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": True}, "logprobs"),
    ],
)
async def test_a_bad_completion_parameter_is_named(client, change, param):
    response = await client.post(COMPLETIONS, json=completion(**change))
    assert response.status_code == 400
    assert error_of(response)["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"model": NaN', b"[" * 100_000, b"[]", b'"hi"', b"null"])
async def test_a_body_that_is_not_a_json_object_is_a_client_error(client, body):
    response = await client.post(CHAT, content=body)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


async def test_the_media_type_does_not_matter_if_the_body_is_json(client):
    response = await client.post(CHAT, content=json.dumps(chat()), headers={"content-type": "text/plain"})
    assert response.status_code == 200


async def test_missing_fields_are_named(client):
    assert error_of(await client.post(CHAT, json={"model": "tiny"}))["param"] == "messages"
    assert error_of(await client.post(COMPLETIONS, json={"prompt": "hi"}))["param"] == "model"


async def test_an_unknown_model_is_404(client):
    for path, body in ((CHAT, chat(model="gpt-9")), (COMPLETIONS, completion(model="gpt-9"))):
        response = await client.post(path, json=body)
        assert response.status_code == 404
        assert error_of(response)["code"] == "model_not_found"


async def test_prompts_longer_than_the_model_are_told_so(client):
    for path, body in (
        (CHAT, chat(messages=[{"role": "user", "content": "é!" * MAX_MODEL_LEN}])),
        (CHAT, chat(max_tokens=MAX_MODEL_LEN)),
        (COMPLETIONS, completion(prompt=[5] * MAX_MODEL_LEN)),
        (COMPLETIONS, completion(prompt="hi", max_tokens=MAX_MODEL_LEN)),
    ):
        response = await client.post(path, json=body)
        assert response.status_code == 400
        error = error_of(response)
        assert error["code"] == "context_length_exceeded"
        assert str(MAX_MODEL_LEN) in error["message"]


async def test_unknown_routes_and_methods(client):
    assert (await client.get("/v2/nothing")).status_code == 404
    assert error_of(await client.get("/v2/nothing"))["type"] == "invalid_request_error"
    response = await client.get(CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert error_of(response)["code"] == "method_not_allowed"
    assert (await client.options(CHAT)).status_code == 204


async def test_a_body_over_the_limit_is_refused_announced_or_not(make_app, backend):
    transport = httpx.ASGITransport(make_app(max_body_bytes=2048))

    async def unannounced():
        for _ in range(10):
            yield b" " * 1024

    async with httpx.AsyncClient(transport=transport, base_url="http://manta") as client:
        for content in (b" " * 4096, unannounced()):
            response = await client.post(CHAT, content=content)
            assert response.status_code == 413
            assert "2048" in error_of(response)["message"]
        assert (await client.post(CHAT, json=chat())).status_code == 200


async def test_what_a_client_sent_is_not_echoed_at_length(client):
    response = await client.post(CHAT, json=chat(model="m" * 500, temperature="x" * 100_000))
    assert len(response.content) < 2000
    response = await client.post(CHAT, json=chat(model="m" * 500))
    assert len(response.content) < 400


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (NotReady("the replica is draining"), 503, "server_error"),
        (GenerationFailed("the replica died"), 500, "server_error"),
        (InvalidRequest("no such thing", param="seed"), 400, "invalid_request_error"),
        (RuntimeError("secret detail"), 500, "server_error"),
    ],
)
async def test_a_failure_before_the_first_token_has_a_status(client, backend, caplog, stream, failure, status, kind):
    backend.script.fail_after, backend.script.error = 0, failure
    response = await client.post(CHAT, json=chat(stream=stream), headers={"x-request-id": "abc"})
    assert response.status_code == status
    error = error_of(response)
    assert error["type"] == kind
    if isinstance(failure, RuntimeError):
        assert "secret" not in response.text
        assert "Traceback" not in response.text
        assert "abc" in error["message"]
        assert "secret detail" in caplog.text
    else:
        assert error["message"] == str(failure)


async def test_not_ready_is_503_everywhere_but_live(client, backend):
    backend.is_ready = False
    for path in ("/health", "/ready", "/v1/models"):
        response = await client.get(path)
        assert response.status_code == 503
        assert response.headers["retry-after"]
        error_of(response)
    assert (await client.post(CHAT, json=chat())).status_code == 503
    assert (await client.get("/live")).status_code == 200


async def test_unknown_fields_are_ignored_and_named_in_the_log_once(client, caplog):
    for _ in range(2):
        response = await client.post(CHAT, json=chat(store=True, frobnicate={"a": 1}))
        assert response.status_code == 200
    assert caplog.text.count("frobnicate") == 1


async def test_harmless_values_of_unsupported_parameters_are_accepted(client):
    harmless = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "user": "u", "top_p": 0}
    nulls = dict.fromkeys(("temperature", "max_tokens", "stop", "logit_bias", "n", "seed", "stream", "tools"))
    assert (await client.post(CHAT, json=chat(**harmless))).status_code == 200
    assert (await client.post(CHAT, json=chat(**nulls))).status_code == 200
