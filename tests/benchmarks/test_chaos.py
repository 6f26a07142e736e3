"""What counts as the same answer, and how long a cut was."""

import asyncio
import json
from dataclasses import replace

import httpx
import pytest

from benchmarks.chaos import Blow, strike_under
from benchmarks.chaos_client import ask
from benchmarks.chaos_streams import Answer, Choice, kinds
from benchmarks.chaos_tally import Tally, percentile


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


def told(text: str, request: str, cached: int) -> Answer:
    """A stream of one event and its usage, as the server writes them."""
    found, head = Answer(), {"id": request, "created": len(request)}
    usage = {"prompt_tokens": 20, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": cached}}
    for payload in ({"choices": [{"index": 0, "text": text}]}, {"choices": [], "usage": usage}):
        found.add(json.dumps(head | payload, separators=(",", ":")))
    return found


def test_what_the_cache_held_is_no_part_of_an_answer_and_every_other_byte_of_its_events_is() -> None:
    assert told("a", "one", 16).difference(told("a", "another", 0)) is None
    split = replace(
        told("a", "one", 0), events=['{"choices":[{"index":0,"text":"a" }]}', *told("a", "one", 0).events[1:]]
    )
    assert "event 1 is" in (told("a", "one", 0).difference(split) or "")


def test_a_gap_is_the_silence_beyond_the_usual_one() -> None:
    cut = replace(answer(), times=[0.0, 0.1, 0.2, 0.3, 0.4, 1.5, 1.6])
    assert cut.gap(0.5) == pytest.approx(1.0)
    assert cut.gap(0.35) == pytest.approx(1.0), "an event that was on its way does not hide it"
    assert cut.gap(0.05) == pytest.approx(0.0)
    assert cut.gap(2.0) is None and answer().gap(0.0) is None


def test_a_stream_that_was_cut_before_its_first_event_has_a_gap_too() -> None:
    cut = replace(answer(), asked=0.0, times=[2.0, 2.1, 2.2], num_events=4)
    assert cut.gap(0.5, 0.3) == pytest.approx(1.7)
    assert cut.gap(2.05, 0.3) == pytest.approx(0.0)
    assert replace(cut, times=[2.0]).gap(0.5, 0.3) == pytest.approx(1.7)
    assert replace(cut, num_events=0).gap(0.5, 0.3) is None, "what comes in one piece is no stream"


def test_who_is_to_be_killed_under_decodes_lives_until_every_stream_has_begun() -> None:
    streams, begun = [Answer(), Answer(), Answer()], []

    async def run() -> None:
        striking = asyncio.create_task(strike_under(streams, Blow(0.0, begun=True), lambda: begun.extend(streams)))
        for each in streams[:2]:
            await asyncio.sleep(0.03)
            each.times.append(1.0)
            assert not begun
        streams[2].error = "refused"
        await striking

    asyncio.run(run())
    assert begun == streams


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


class Gateway:
    """Answers one request after the other with what it was given; remembers what it was asked."""

    def __init__(self, *answers: httpx.Response | httpx.TransportError) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[str, str, str | None]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.method, request.url.path, request.headers.get("last-event-id")))
        answer = self._answers.pop(0)
        if isinstance(answer, httpx.TransportError):
            raise answer
        return answer


def persistent(gateway: Gateway, number: int = 0) -> Answer:
    """What a client that comes back reads; `number`: of the kind."""
    kind = kinds("model", "prompt", 3, "stop")[number]

    async def read() -> Answer:
        async with httpx.AsyncClient(transport=httpx.MockTransport(gateway), base_url="http://server") as http:
            return await ask(http, kind, comes_back=True)

    return asyncio.run(read())


def stream(*events: str, first: int = 1) -> httpx.Response:
    text = "".join(f"id: stream:{number}\n{each}" for number, each in enumerate(events, first))
    return httpx.Response(200, text=text, headers={"x-manta-stream-id": "stream"})


A, B = event(choices=[{"index": 0, "text": "a"}]), event(choices=[{"index": 0, "text": "b"}])
DONE = "data: [DONE]\n\n"
PROXY_SAYS_NO = httpx.Response(500, text="Internal Server Error")


def test_a_stream_that_was_cut_is_read_on_after_its_last_event() -> None:
    gateway = Gateway(stream(A), PROXY_SAYS_NO, httpx.ConnectError("refused"), stream(B, DONE, first=2))
    found = persistent(gateway)
    assert found.error is None and found.choices[0].text == "ab" and found.num_events == 3
    assert found.resumed and not found.repeated
    assert gateway.asked == [("POST", "/v1/completions", None), *[("GET", "/v1/streams/stream", "stream:1")] * 3]


def test_what_has_not_begun_is_asked_for_anew() -> None:
    gateway = Gateway(httpx.ReadError("reset"), httpx.Response(503, text='{"error": {}}'), stream(A, DONE))
    found = persistent(gateway)
    assert found.error is None and found.choices[0].text == "a" and found.repeated and not found.resumed
    whole = httpx.Response(200, json={"choices": [{"index": 0, "text": "a"}]})
    found = persistent(Gateway(httpx.RemoteProtocolError("cut"), whole), number=-1)
    assert found.error is None and found.choices[0].text == "a" and found.repeated


def test_what_no_client_may_forgive_is_an_error() -> None:
    internal = httpx.Response(500, text='{"error": {"message": "internal"}}')
    assert "internal" in (persistent(Gateway(internal)).error or "")
    assert "HTTP 404" in (persistent(Gateway(stream(A), httpx.Response(404, text="unknown"))).error or "")
    assert persistent(Gateway(stream(A), stream(A, B, DONE))).error == "event stream:1 came after number 1"
    assert persistent(Gateway(stream(A, B, DONE, first=2))).error == "event stream:2 came after number 0"


def test_events_are_compared_byte_by_byte_but_for_what_is_each_request_s_own() -> None:
    def said(identity: str, text: str) -> Answer:
        found = Answer()
        found.add(f'{{"id":"{identity}","created":{len(identity)},"choices":[{{"index":0,"text":{text}}}]}}')
        return found

    assert said("one", '"a"').difference(said("another", '"a"')) is None
    assert "event 1 is" in (said("one", '"\\u0061"').difference(said("one", '"a"')) or "")
    twice = said("one", '"a"')
    twice.add('{"choices":[]}')
    assert twice.difference(said("one", '"a"')) == "2 events instead of 1"


def test_a_tally_says_who_was_cut_by_whom() -> None:
    def streamed(silence: float, **how: object) -> Answer:
        return replace(answer(), times=[0.0, 0.1, 0.2, 0.2 + silence], **how)  # type: ignore[arg-type]

    tally = Tally(["a", "b"], ["replica", "gateway", "kv-host"])
    calm = [replace(answer(), asked=0.0, times=[0.4], num_events=2), answer()]
    late = replace(answer(), id="one", asked=0.0, times=[1.5, 1.6], num_events=3)
    assert tally.add("replica", [late, streamed(2.1, id="two")], calm, 0.3, {"one"}) == []
    assert tally.add("gateway", [streamed(0.1), streamed(3.1, resumed=True)], calm, 0.25, ()) == []
    wrong = [answer(text="x"), replace(answer(), error="lost", repeated=True)]
    assert tally.add("gateway", wrong, calm, 0.3, ()) == ["a: choice 0 differs from character 0 of 3 on", "b: lost"]
    assert not tally.add("kv-host", [streamed(0.1), streamed(0.6)], calm, 0.25, ())
    replica, gateway, host = tally.victims.values()
    assert (replica.answers, replica.cut) == (2, 1) and replica.gaps == pytest.approx([1.1]), "the one that went on"
    assert (gateway.cut, gateway.resumed, gateway.repeated, gateway.errors, gateway.mismatches) == (2, 1, 1, 1, 1)
    assert gateway.gaps == pytest.approx([3.0])
    assert host.cut == 0 and sorted(host.gaps) == pytest.approx([0.0, 0.5])
    assert (tally.kinds["a"].cut, tally.kinds["b"].cut) == (1, 2) and tally.failed
    assert tally.table().splitlines()[-1].split()[:7] == ["all", "8", "3", "1", "1", "1", "1"]
