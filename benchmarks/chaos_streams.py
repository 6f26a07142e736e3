"""Kinds of requests, and what came of one: its answer in a form that can be compared, and when each part of it came.

Knows the API and nothing of who is killed, nor when.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice, pairwise, takewhile
from statistics import median
from typing import Any

import httpx

PROMPT = "One day a little cat went to the market with her friend"
LOGPROB_TOLERANCE = 1e-3
IN_FLIGHT_S = 0.2
"""For how long after a kill there may still come what the replica had sent before it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to ask."""

    name: str
    path: str
    body: Mapping[str, Any]


@dataclass(slots=True)
class Choice:
    text: str = ""
    reason: str | None = None
    logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """What came of one request."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    times: list[float] = field(default_factory=list)
    """When each event came; of an answer in one piece, when it came."""

    def difference(self, other: "Answer") -> str | None:
        """What is not as in the other one; None if all is. Log-probabilities may differ by rounding."""
        if self.choices.keys() != other.choices.keys():
            return f"{len(self.choices)} choices instead of {len(other.choices)}"
        for index, choice in self.choices.items():
            wanted = other.choices[index]
            if choice.text != wanted.text:
                pairs = zip(choice.text, wanted.text, strict=False)
                same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
                return f"choice {index} differs from character {same} of {len(wanted.text)} on"
            if choice.reason != wanted.reason:
                return f"choice {index} ended with {choice.reason} instead of {wanted.reason}"
            if len(choice.logprobs) != len(wanted.logprobs):
                return f"{len(choice.logprobs)} logprobs instead of {len(wanted.logprobs)}"
            both = zip(choice.logprobs, wanted.logprobs, strict=True)
            if any(abs(found - expected) > LOGPROB_TOLERANCE for found, expected in both):
                return f"logprobs of choice {index} differ"
        return None if self.usage == other.usage else f"usage {self.usage} instead of {other.usage}"

    def gap(self, moment: float) -> float | None:
        """By how many seconds the silence that begins at a moment is longer than is usual here; None if it was over."""
        spans = list(pairwise(self.times))
        around = [end - begin for begin, end in spans if moment < end and begin < moment + IN_FLIGHT_S]
        if not around:
            return None
        return max(0.0, max(around) - median(end - begin for begin, end in spans))


def kinds(model: str, prompt: str, max_tokens: int, stop: str) -> list[Kind]:
    """Every kind of request. `stop`: text that the greedy answer comes to."""
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    base = {"model": model, "max_tokens": max_tokens, "ignore_eos": True}
    text = {**base, "prompt": prompt}
    messages = [{"role": "user", "content": prompt}]
    seeded = {"temperature": 0.8, "seed": 7}
    greedy = {"temperature": 0}
    completions, chat = "/v1/completions", "/v1/chat/completions"
    return [
        Kind("greedy", completions, {**text, **streamed, **greedy}),
        Kind("seeded", completions, {**text, **streamed, **seeded}),
        Kind("n=3", completions, {**text, **streamed, **seeded, "n": 3}),
        Kind("logprobs", completions, {**text, **streamed, **greedy, "logprobs": 3}),
        Kind("stop string", completions, {**text, **streamed, **greedy, "stop": [stop]}),
        Kind(
            "penalties",
            completions,
            {
                **text,
                **streamed,
                **greedy,
                "frequency_penalty": 0.5,
                "presence_penalty": 0.3,
                "repetition_penalty": 1.1,
            },
        ),
        Kind("echo", completions, {**text, **streamed, **greedy, "echo": True}),
        Kind("chat", chat, {**base, **streamed, **seeded, "messages": messages}),
        Kind("chat, logprobs", chat, {**base, **streamed, **greedy, "messages": messages, "logprobs": True}),
        Kind("in one piece", completions, {**text, **seeded, "n": 2}),
        Kind("echo, logprobs", completions, {**text, **greedy, "echo": True, "logprobs": 1}),
    ]


def lengthened(asked: Sequence[Kind], words: int) -> list[Kind]:
    """The same with prompts of so many words more, which begin differently: none finds what another has computed.

    Only the stop string's prompt is the greedy one's, as it waits for something that the greedy answer says.
    """
    return [_lengthened(kind, 0 if kind.name == "stop string" else number, words) for number, kind in enumerate(asked)]


def _lengthened(kind: Kind, number: int, words: int) -> Kind:
    def longer(prompt: str) -> str:
        return " ".join([str(number), *islice(cycle(PROMPT.split()), words), prompt])

    body = dict(kind.body)
    if "prompt" in body:
        body["prompt"] = longer(body["prompt"])
    else:
        body["messages"] = [{**message, "content": longer(message["content"])} for message in body["messages"]]
    return replace(kind, body=body)


def salted(asked: Sequence[Kind], salt: str) -> list[Kind]:
    """The same, apart from what any cache holds of another salt."""
    return [replace(kind, body={**kind.body, "cache_salt": salt}) for kind in asked]


async def ask(http: httpx.AsyncClient, kind: Kind) -> Answer:
    """Reads one answer to its end; an error is a part of the answer."""
    answer = Answer()
    try:
        async with http.stream("POST", kind.path, json=kind.body) as response:
            if response.status_code != 200:
                answer.error = f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')[:300]}"
                return answer
            if not kind.body.get("stream"):
                _take(answer, json.loads(await response.aread()))
                return answer
            ended = False
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    _take(answer, json.loads(line[6:]))
                ended = ended or line == "data: [DONE]"
            if not ended and answer.error is None:
                answer.error = "the stream ended without [DONE]"
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def _take(answer: Answer, payload: dict[str, Any]) -> None:
    answer.times.append(time.monotonic())
    if "error" in payload:
        answer.error = payload["error"]["message"]
        return
    if usage := payload.get("usage"):
        answer.usage = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
    for part in payload["choices"]:
        choice = answer.choices.setdefault(part["index"], Choice())
        if "text" in part:
            choice.text += part["text"]
        else:
            message = part.get("delta") or part.get("message") or {}
            choice.text += message.get("content") or ""
        choice.reason = part.get("finish_reason") or choice.reason
        choice.logprobs += _logprobs(part.get("logprobs") or {})


def _logprobs(found: dict[str, Any]) -> list[float]:
    if "token_logprobs" in found:
        return [value for value in found["token_logprobs"] if value is not None]
    return [entry["logprob"] for entry in found.get("content") or ()]
