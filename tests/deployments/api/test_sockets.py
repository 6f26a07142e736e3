"""Over a real socket: when the first byte comes, and what a client that leaves sets free."""

import http.client
import itertools
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.deployments.api.serving import serving

CHAT = "/v1/chat/completions"
PATIENCE = 5.0


@pytest.fixture
def url(make_app) -> Iterator[str]:
    with serving(make_app()) as url:
        yield url


def body(**changes: Any) -> bytes:
    return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **changes}).encode()


def send(url: str, payload: bytes, *, path: str = CHAT) -> socket.socket:
    """A request on a raw connection of its own."""
    where = urlsplit(url)
    connection = socket.create_connection((where.hostname, where.port), timeout=PATIENCE)
    head = f"POST {path} HTTP/1.1\r\nHost: manta\r\nContent-Length: {len(payload)}\r\n\r\n"
    connection.sendall(head.encode() + payload)
    return connection


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def test_tokens_arrive_as_they_are_made(url, backend):
    backend.script.delay = 0.05
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    connection.request("POST", CHAT, body(stream=True))
    response = connection.getresponse()
    arrivals = [time.monotonic() for line in response if line.startswith(b"data: ")]
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert sum(gap > 0.025 for gap in gaps) >= 5


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation_within_an_iteration(url, backend, recorder, stream):
    backend.script.answers = ("one two three four five " * 8,)
    backend.script.delay = 0.02
    connection = send(url, body(stream=stream))
    wait_until(lambda: backend.emitted >= 3)
    left = time.perf_counter()
    connection.close()
    wait_until(lambda: backend.closed_at)
    assert backend.closed_at[0] - left < 0.25
    emitted = backend.emitted
    time.sleep(0.1)
    assert backend.emitted == emitted
    wait_until(lambda: ("manta:request_success_total", ("abort",)) in recorder.drain().counters)


def test_a_client_that_leaves_before_the_first_token_ends_its_generation(url, backend):
    backend.script.delay = 30.0
    connection = send(url, body(stream=True))
    wait_until(lambda: backend.requests)
    connection.close()
    wait_until(lambda: backend.closed_at)
    assert backend.emitted == 0


def test_a_client_that_leaves_one_of_several_prompts_ends_them_all(url, backend):
    backend.script.delay = 0.05
    backend.script.answers = ("one two three four five " * 8,)
    payload = json.dumps({"model": "tiny", "prompt": ["a", "b", "c"], "max_tokens": 200, "stream": True}).encode()
    connection = send(url, payload, path="/v1/completions")
    wait_until(lambda: backend.emitted >= 3)
    connection.close()
    wait_until(lambda: len(backend.closed_at) == 3)
    assert len(backend.requests) == 3


def test_one_client_that_leaves_does_not_disturb_another(url, backend):
    backend.script.delay = 0.01
    leaving = send(url, body(stream=True))
    staying = send(url, body())
    wait_until(lambda: backend.emitted >= 2)
    leaving.close()
    answer = http.client.HTTPResponse(staying)
    answer.begin()
    assert json.loads(answer.read())["choices"][0]["message"]["content"] == "hello to the moon"


def test_a_body_that_never_ends_is_cut_at_the_limit(make_app):
    with serving(make_app(max_body_bytes=4096)) as url:
        where = urlsplit(url)
        connection = socket.create_connection((where.hostname, where.port), timeout=PATIENCE)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: manta\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        # One chunk too many, and then silence: the answer must not wait for an end that never comes.
        connection.sendall(head + (b"400\r\n" + b" " * 1024 + b"\r\n") * 5)
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]
