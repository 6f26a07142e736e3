"""Kinds of requests, and what came of one: its answer in a form that can be compared, and when each part of it came.

Knows the API and nothing of who is killed, nor when.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice, pairwise, takewhile
from statistics import median
from typing import Any

PROMPT = "One day a little cat went to the market with her friend"
LOGPROB_TOLERANCE = 1e-3
_OWN = re.compile(r'"id":"[^"]*",|"created":\d+,|,"prompt_tokens_details":{[^}]*}')
"""What an event says of its request alone: of two with one prompt, whichever is later finds what the other computed."""
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
    id: str = ""
    """By which the server's log knows the request."""
    asked: float | None = None
    """When it was asked for first."""
    times: list[float] = field(default_factory=list)
    """When each event came; of an answer in one piece, when it came."""
    events: list[str] = field(default_factory=list)
    """What each event of a stream said, but for what no two requests have in common."""
    num_events: int = 0
    """Of a stream, with that of its end."""
    stream_id: str = ""
    """Of a stream that can be asked for again."""
    resumed: bool = False
    """Whether it came over several connections."""
    repeated: bool = False
    """Whether it had to be asked for anew."""

    def add(self, data: str) -> None:
        """The next event of a stream."""
        self.events.append(_OWN.sub("", data))
        self.take(json.loads(data))

    def take(self, payload: dict[str, Any]) -> None:
        """What an event, or an answer in one piece, says."""
        self.times.append(time.monotonic())
        if "error" in payload:
            self.error = payload["error"]["message"]
            return
        self.id = payload.get("id", "")
        if usage := payload.get("usage"):
            self.usage = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        for part in payload["choices"]:
            choice = self.choices.setdefault(part["index"], Choice())
            if "text" in part:
                choice.text += part["text"]
            else:
                message = part.get("delta") or part.get("message") or {}
                choice.text += message.get("content") or ""
            choice.reason = part.get("finish_reason") or choice.reason
            choice.logprobs += _logprobs(part.get("logprobs") or {})

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
        if self.usage != other.usage:
            return f"usage {self.usage} instead of {other.usage}"
        return self._different_event(other)

    def _different_event(self, other: "Answer") -> str | None:
        """Of equal answers also the events are equal, byte by byte, those apart that bring rounded numbers."""
        if len(self.events) != len(other.events):
            return f"{len(self.events)} events instead of {len(other.events)}"
        for number, (found, expected) in enumerate(zip(self.events, other.events, strict=True), 1):
            if found != expected and not any(choice.logprobs for choice in self.choices.values()):
                return f"event {number} is {found} instead of {expected}"
        return None

    @property
    def first_s(self) -> float | None:
        """Seconds until its first event; None of what is no stream."""
        if self.asked is None or not self.num_events or not self.times:
            return None
        return self.times[0] - self.asked

    def gap(self, moment: float, usual_first_s: float | None = None) -> float | None:
        """By how many seconds the silence that begins at a moment is longer than is usual here; None if it was over.

        `usual_first_s`: before the first event, which may be that silence.
        """
        spans = list(pairwise(self.times))
        usual = median(end - begin for begin, end in spans) if spans else 0.0
        silences = [(begin, end, usual) for begin, end in spans]
        if self.asked is not None and self.first_s is not None and usual_first_s is not None:
            silences.append((self.asked, self.times[0], usual_first_s))
        around = [
            end - begin - beyond for begin, end, beyond in silences if moment < end and begin < moment + IN_FLIGHT_S
        ]
        return max(0.0, *around) if around else None


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


def _logprobs(found: dict[str, Any]) -> list[float]:
    if "token_logprobs" in found:
        return [value for value in found["token_logprobs"] if value is not None]
    return [entry["logprob"] for entry in found.get("content") or ()]
