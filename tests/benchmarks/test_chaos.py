"""What counts as the same answer, and how long a cut was."""

import asyncio
import json
from dataclasses import replace

import httpx
import pytest

from benchmarks.chaos_client import ask
from benchmarks.chaos_streams import Answer, Choice, kinds
from benchmarks.chaos_tally import percentile


def answer(text: str = "abc", reason: str = "length", logprobs: tuple[float, ...] = (-1.0,), tokens: int = 3) -> Answer:
    return Answer({0: Choice(text, reason, list(logprobs))}, {"prompt_tokens": 5, "completion_tokens": tokens})


def test_an_answer_is_itself_and_logprobs_may_be_rounded() -> None:
    assert answer().difference(answer()) is None
    assert answer(logprobs=(-1.0001,)).difference(answer()) is None


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (answer(text="abx"), "differs from character 2 of 3"),
        (answer(reason="stop"), "ended with length instead of stop"),
        (answer(logprobs=(-1.1,)), "logprobs of choice 0 differ"),
        (answer(logprobs=()), "1 logprobs instead of 0"),
        (answer(tokens=4), "usage"),
        (Answer(), "1 choices instead of 0"),
    ],
)
def test_what_is_different_is_said(other: Answer, complaint: str) -> None:
    assert complaint in (answer().difference(other) or "")


def test_a_gap_is_the_silence_beyond_the_usual_one() -> None:
    cut = replace(answer(), times=[0.0, 0.1, 0.2, 0.3, 0.4, 1.5, 1.6])
    assert cut.gap(0.5) == pytest.approx(1.0)
    assert cut.gap(0.35) == pytest.approx(1.0), "an event that was on its way does not hide it"
    assert cut.gap(0.05) == pytest.approx(0.0)
    assert cut.gap(2.0) is None and answer().gap(0.0) is None


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.99) == 2.0
    assert percentile([], 0.5) is None


def reply(events: list[str], status: int = 200) -> Answer:
    (kind, *_) = kinds("model", "prompt", 3, "stop")

    async def read() -> Answer:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, text="".join(events)))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return await ask(http, kind)

    return asyncio.run(read())


def event(**payload: object) -> str:
    return f"data: {json.dumps(payload)}\n\n"


def test_a_stream_is_read_to_its_end() -> None:
    found = reply(
        [
            event(choices=[{"index": 0, "text": "a", "logprobs": {"token_logprobs": [None, -0.5]}}]),
            ": keep-alive\n\n",
            event(choices=[{"index": 0, "text": "b", "finish_reason": "length"}]),
            event(choices=[], usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}),
            "data: [DONE]\n\n",
        ]
    )
    assert found.error is None and found.choices == {0: Choice("ab", "length", [-0.5])}
    assert found.usage == {"prompt_tokens": 1, "completion_tokens": 2}


def test_what_ends_early_or_with_an_error_is_an_error() -> None:
    assert reply([event(choices=[])]).error == "the stream ended without [DONE]"
    assert reply([event(error={"message": "lost"})]).error == "lost"
    assert "HTTP 503" in (reply(["loading"], 503).error or "")
