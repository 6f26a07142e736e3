"""What the two endpoints answer, whole and streamed."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from deployments.backend import GenerationFailed, ModelGone
from deployments.config import GatewayConfig
from deployments.gateway_app import build_http
from deployments.text import TextModel
from tests.deployments.api.tiny import MAX_MODEL_LEN

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ANSWER = "hello to the moon"


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **changes}


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi", **changes}


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    """The events' payloads, [DONE] as it stands."""
    response = await client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    frames = response.text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") for frame in frames)
    payloads = [frame.removeprefix("data: ") for frame in frames]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


async def test_a_chat_answer(client, backend, text):
    answer = await post(client, CHAT, chat())
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert choice["finish_reason"] == "stop"
    prompt = backend.requests[0].prompt_token_ids
    assert text.decode(prompt, skip_special_tokens=False) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    num_tokens = len(text.encode(ANSWER)) + 1
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": num_tokens,
        "total_tokens": len(prompt) + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_the_frames_of_a_streamed_chat(client):
    *chunks, usage, done = await stream(client, CHAT, chat(stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert chunks[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == ANSWER
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 0


async def test_usage_is_absent_unless_asked_for_and_continuous_on_request(client):
    assert all("usage" not in chunk for chunk in (await stream(client, CHAT, chat()))[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk["usage"]["completion_tokens"] for chunk in (await stream(client, CHAT, chat(stream_options=options)))[:-1]
    ]
    assert counts == sorted(counts)
    assert counts[0] == 1


async def test_the_streaming_headers(client):
    response = await client.post(CHAT, json=chat(stream=True), headers={"X-Request-Id": "my/id\t" + "x" * 500})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    request_id = response.headers["x-request-id"]
    assert request_id.startswith("myidxxx")
    assert len(request_id) == 128
    assert f'"chatcmpl-{request_id}"' in response.text


async def test_stop_strings_end_a_choice_and_abort_the_rest(client, backend, text):
    backend.script.answers = ("hello to the moon and back again",)
    for body in (chat(stop="the"), chat(stop=["xyz", " the"])):
        answer = await post(client, CHAT, body)
        choice = answer["choices"][0]
        assert choice["message"]["content"].rstrip() == "hello to"
        assert (choice["finish_reason"], choice["stop_reason"].strip()) == ("stop", "the")
        assert answer["usage"]["completion_tokens"] == len(text.encode("hello to the"))
    assert len(backend.closed_at) == 2
    assert backend.emitted == 2 * len(text.encode("hello to the"))
    streamed = await stream(client, CHAT, chat(stop="the"))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed[:-1]) == "hello to "


async def test_several_samples_are_choices_of_their_own(client, backend):
    backend.script.answers = ("one", "two three four", "hello")
    answer = await post(client, CHAT, chat(n=3))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in answer["choices"]] == list(backend.script.answers)
    assert len(backend.requests) == 1
    chunks = (await stream(client, CHAT, chat(n=3)))[:-1]
    for index, expected in enumerate(backend.script.answers):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["finish_reason"] == "stop"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == expected


async def test_characters_are_never_split_between_chunks(client, backend):
    backend.script.answers = ("😀日本語 über",)
    chunks = (await stream(client, CHAT, chat()))[:-1]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == "😀日本語 über"
    assert "\ufffd" not in "".join(pieces)


async def test_chat_logprobs(client, text):
    answer = await post(client, CHAT, chat(logprobs=True, top_logprobs=2, max_tokens=3))
    content = answer["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == answer["choices"][0]["message"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "".join(e["token"] for e in content)
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] == -0.5 for entry in content)
    chunks = (await stream(client, CHAT, chat(logprobs=True, max_tokens=3)))[:-1]
    streamed = [e for chunk in chunks for e in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]


async def test_messages_in_parts_developer_turns_and_template_arguments(client, backend, text):
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "once"},
    ]
    await post(client, CHAT, chat(messages=messages, continue_final_message=True))
    prompt = text.decode(backend.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\na\nb<|im_end|>")
    assert prompt.endswith("assistant\nonce")


async def test_parameters_reach_the_engine(client, backend):
    sent = {"temperature": 0.3, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "seed": 7, "presence_penalty": 1.0}
    sent |= {"frequency_penalty": -1.0, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True, "max_tokens": 9}
    await post(
        client, CHAT, chat(**sent, logit_bias={"5": -100}, stop_token_ids=[7], allowed_token_ids=[4, 4], priority=3)
    )
    request = backend.requests[0]
    params = request.params.model_dump()
    assert {name: params[name] for name in sent if name != "top_k"} == {k: v for k, v in sent.items() if k != "top_k"}
    assert params["top_k"] == 0
    assert (params["logit_bias"], params["stop_token_ids"], params["allowed_token_ids"]) == ({5: -100.0}, (7,), (4,))
    assert request.priority == 3


async def test_defaults_are_openais(client, backend):
    await post(client, CHAT, chat())
    await post(client, COMPLETIONS, completion())
    chat_params, completion_params = (request.params for request in backend.requests)
    room = MAX_MODEL_LEN - len(backend.requests[0].prompt_token_ids)
    assert (chat_params.max_tokens, chat_params.temperature, chat_params.logprobs) == (room, 1.0, None)
    assert completion_params.max_tokens == 16


async def test_a_completion_of_several_prompts(client, backend):
    backend.script.answers = ("one", "two")
    answer = await post(client, COMPLETIONS, completion(prompt=["a", "bc"], n=2))
    assert answer["object"] == "text_completion"
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "one"), (1, "two"), (2, "one"), (3, "two")]
    assert answer["usage"]["prompt_tokens"] == sum(len(request.prompt_token_ids) for request in backend.requests)
    chunks = await stream(client, COMPLETIONS, completion(prompt=["a", "bc"], n=2))
    texts = {0: "", 1: "", 2: "", 3: ""}
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "one", 1: "two", 2: "one", 3: "two"}
    assert len({request.request_id for request in backend.requests}) == 4


async def test_token_ids_in_and_out(client, backend, text):
    ids = text.encode("hello")
    for prompt in (ids, [ids]):
        answer = await post(client, COMPLETIONS, completion(prompt=prompt, return_token_ids=True, echo=True))
        choice = answer["choices"][0]
        assert choice["text"] == "hello" + ANSWER
        assert choice["prompt_token_ids"] == ids
        assert choice["token_ids"][:-1] == text.encode(ANSWER)
    chunks = await stream(client, COMPLETIONS, completion(prompt=ids, return_token_ids=True))
    streamed = [token for chunk in chunks[:-1] for token in chunk["choices"][0]["token_ids"]]
    assert streamed[:-1] == text.encode(ANSWER)


async def test_echo_with_logprobs_covers_prompt_and_answer(client, text):
    body = completion(prompt="one two", echo=True, logprobs=2, max_tokens=3)
    answer = await post(client, COMPLETIONS, body)
    choice = answer["choices"][0]
    rows = choice["logprobs"]
    assert rows["tokens"] == [text.token_text(i) for i in [*text.encode("one two"), *text.encode(ANSWER)[:3]]]
    assert rows["token_logprobs"][0] is None
    assert rows["top_logprobs"][0] is None
    assert set(rows["token_logprobs"][1:]) == {-0.5}
    assert all(token in top for token, top in zip(rows["tokens"][1:], rows["top_logprobs"][1:], strict=True))
    assert all(choice["text"][o:].startswith(t) for t, o in zip(rows["tokens"], rows["text_offset"], strict=True))
    merged: dict[str, list[Any]] = {name: [] for name in rows}
    for chunk in (await stream(client, COMPLETIONS, body))[:-1]:
        for name, values in chunk["choices"][0]["logprobs"].items():
            merged[name] += values
    assert merged == rows


async def test_scoring_a_text_generates_nothing(client, text):
    answer = await post(client, COMPLETIONS, completion(prompt="one two", echo=True, logprobs=1, max_tokens=0))
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one two", "length")
    assert len(choice["logprobs"]["tokens"]) == len(text.encode("one two"))
    assert answer["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs_in_vllms_form(client, text):
    answer = await post(client, COMPLETIONS, completion(prompt="one two", prompt_logprobs=1))
    rows = answer["choices"][0]["prompt_logprobs"]
    ids = text.encode("one two")
    assert rows[0] is None
    assert [list(row) for row in rows[1:]] == [[str(token)] for token in ids[1:]]
    assert rows[1][str(ids[1])] == {"logprob": -0.5, "rank": 1, "decoded_token": text.token_text(ids[1])}
    assert (await post(client, CHAT, chat(prompt_logprobs=0)))["prompt_logprobs"][0] is None


async def test_a_failure_after_the_first_token_is_told_in_the_stream_and_never_ends_in_done(client, backend, recorder):
    backend.script.fail_after, backend.script.error = 3, GenerationFailed("the replica died")
    for path, body in ((CHAT, chat()), (COMPLETIONS, completion())):
        events = await stream(client, path, body)
        assert events[-1]["error"]["message"] == "the replica died"
        assert events[-1]["error"]["type"] == "server_error"
        assert "[DONE]" not in events
    assert recorder.drain().counters["manta:request_success_total", ("error",)] == 2


async def test_a_backend_that_stops_early_is_a_failure(client, backend, monkeypatch):
    emissions = backend._emissions
    monkeypatch.setattr(type(backend), "_emissions", lambda self, request: list(emissions(request))[:2])
    assert (await client.post(CHAT, json=chat())).status_code == 500
    assert "error" in (await stream(client, CHAT, chat()))[-1]


async def test_what_a_request_leaves_in_the_metrics(client, backend, recorder, text):
    backend.script.answers = ("one two three", "hello")
    await post(client, CHAT, chat(n=2, max_tokens=50))
    delta = recorder.drain()
    assert delta.counters["manta:request_success_total", ("stop",)] == 2
    assert delta.counters["manta:http_requests_total", ("POST", "2xx", CHAT)] == 1
    counts = {name: sum(histogram.counts) for (name, _), histogram in delta.histograms.items()}
    num_tokens = [len(text.encode(answer)) + 1 for answer in backend.script.answers]
    assert counts["manta:time_to_first_token_seconds"] == 1
    assert counts["manta:e2e_request_latency_seconds"] == 1
    assert counts["manta:inter_token_latency_seconds"] == sum(num_tokens) - 2
    assert counts["manta:request_time_per_output_token_seconds"] == 2
    assert delta.histograms["manta:request_generation_tokens", ()].total == sum(num_tokens)
    assert delta.histograms["manta:request_params_max_tokens", ()].total == 50


async def test_more_requests_than_a_gateway_holds_are_told_to_come_back(make_app, backend):
    backend.script.delay = 0.02
    transport = httpx.ASGITransport(make_app(max_queued_requests=1))
    async with httpx.AsyncClient(transport=transport, base_url="http://manta") as client:
        responses = await asyncio.gather(*(client.post(CHAT, json=chat(stream=i % 2 == 0)) for i in range(4)))
        assert sorted(response.status_code for response in responses) == [200, 429, 429, 429]
        refused = next(response for response in responses if response.status_code == 429)
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert (await client.post(CHAT, json=chat())).status_code == 200


async def test_models_and_status(client, backend):
    listed = (await client.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert (await client.get("/v1/models/tiny")).json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == backend.model.max_model_len
    assert listed["data"][0]["owned_by"] == "manta"
    assert (await client.get("/v1/models/other")).json()["error"]["code"] == "model_not_found"
    assert (await client.get("/version")).json() == {"version": "1.2.3"}
    assert (await client.get("/metrics")).headers["content-type"].startswith("text/plain; version=0.0.4")
    assert (await client.head("/health")).status_code == 200


async def test_the_api_documents_its_bodies(client):
    document = (await client.get("/openapi.json")).json()
    body = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = body["$ref"].removeprefix("#/components/schemas/")
    properties = document["components"]["schemas"][name]["properties"]
    assert {"messages", "temperature", "stream"} <= set(properties)


async def test_a_model_whose_files_were_replaced_is_read_again(backend, recorder, text):
    loaded: list[str] = []

    def load(path: str) -> TextModel:
        loaded.append(path)
        return text

    app = build_http(backend, GatewayConfig(), recorder, version="1", load_text=load)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://manta") as client:
        await post(client, CHAT, chat())
        backend.model = replace(backend.model, max_model_len=200)
        await post(client, COMPLETIONS, completion())
        assert loaded == ["/models/tiny"]
        backend.model = replace(backend.model, identity="tiny-2")
        await post(client, CHAT, chat())
        assert loaded == ["/models/tiny"] * 2
    assert [request.model for request in backend.requests] == ["tiny-1", "tiny-1", "tiny-2"]
    assert backend.requests[-1].params.max_tokens == 200 - len(backend.requests[-1].prompt_token_ids)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_for_a_model_that_was_just_replaced_is_told_to_come_back(client, backend, stream):
    backend.script.fail_after, backend.script.error = 0, ModelGone("the model has been replaced")
    response = await client.post(CHAT, json=chat(stream=stream))
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["code"] == "model_gone"
