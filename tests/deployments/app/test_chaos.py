"""The built-in model behind two gateways, and every kind of request: whoever is killed or stopped, no answer differs.

The tests build on each other: the KV host that one of them stops is still so in the next.
"""

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import pytest

from benchmarks.chaos import Calm, undisturbed
from benchmarks.chaos_client import SILENCE_S, ask_all
from benchmarks.chaos_server import Server
from benchmarks.chaos_streams import PROMPT, Answer, salted
from tests.compiled import compiled_library

MAX_TOKENS = 800
IMPATIENT_S = 2.0
"""After which clients give up the connection to a stopped gateway; the pauses of a calm stream are far shorter."""
STOPPED_S = 4.0
LATEST = 300
"""Events of the first stream before something strikes, at most: engines are ahead of clients that share their cores."""
NOTICED_S = 5.0
"""Within which a replica that says nothing has to be found, and its streams have to go on elsewhere."""
MARGIN_S = 2.0
"""For the other replica, which computes what both did, on cores that it shares with the clients."""
PATIENCE_S = 90.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    compiled_library()
    log = tmp_path_factory.mktemp("log") / "serve.log"
    found = Server(["--served-model-name", "model"], log, replicas=2, gateways=2, kv_host=True)
    yield found
    found.close()


@pytest.fixture(scope="module")
def calm(server: Server) -> Calm:
    return undisturbed(server.url, "model", PROMPT, 0, MAX_TOKENS)


def answers_under(
    server: Server, calm: Calm, salt: str, strike: Callable[[], None], silence_s: float = SILENCE_S
) -> list[Answer]:
    """All kinds of requests with something that strikes amid them; none ends in an error, none differs.

    When it strikes is drawn, by `salt`.
    """
    asked = salted(calm.asked, salt)
    answers = [Answer() for _ in asked]
    struck_at = random.Random(salt).randint(1, LATEST)

    async def ask_and_strike() -> None:
        asking = asyncio.create_task(ask_all(server.url, asked, comes_back=True, silence_s=silence_s, into=answers))
        while answers[0].num_events < struck_at:
            await asyncio.sleep(0.01)
        strike()
        await asking

    asyncio.run(asyncio.wait_for(ask_and_strike(), PATIENCE_S))
    for kind, answer, expected in zip(asked, answers, calm.answers, strict=True):
        assert answer.error is None, kind.name
        assert answer.difference(expected) is None, kind.name
    return answers


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.1)


def test_a_killed_replica_costs_no_answer_and_no_connection(server: Server, calm: Calm) -> None:
    strike = partial(server.kill, "replica", server.processes("replica")[0], signal.SIGKILL)
    answers = answers_under(server, calm, "replica killed", strike)
    assert not any(answer.resumed or answer.repeated for answer in answers)
    until(lambda: bool(server.continued() & {answer.id for answer in answers}))  # the log may come later
    until(server.complete)


def test_a_killed_gateway_costs_no_answer(server: Server, calm: Calm) -> None:
    strike = partial(server.kill, "gateway", server.processes("gateway")[0], signal.SIGKILL)

    answers = answers_under(server, calm, "gateway killed", strike)
    assert any(answer.resumed or answer.repeated for answer in answers), "nobody was at that gateway"
    until(server.complete)


def test_a_killed_kv_host_costs_no_connection(server: Server, calm: Calm) -> None:
    until(lambda: sum(server.series("manta:kv_host_memory_pages")) > 0)
    strike = partial(server.kill, "kv-host", server.processes("kv-host")[0], signal.SIGKILL)
    answers = answers_under(server, calm, "host killed", strike)
    assert not any(answer.resumed or answer.repeated for answer in answers)
    until(server.complete)


def test_a_stopped_kv_host_stops_neither_replicas_nor_those_who_take_their_streams(server: Server, calm: Calm) -> None:
    """A replica dies too: the other one looks for pages at a host that says nothing, for as long as it has patience."""
    host, replica = server.processes("kv-host")[0], server.processes("replica")[0]

    def strike() -> None:
        server.kill("kv-host", host, signal.SIGSTOP)
        server.kill("replica", replica, signal.SIGKILL)

    answers = answers_under(server, calm, "host stopped", strike)
    assert not any(answer.resumed or answer.repeated for answer in answers)
    until(lambda: sum(server.series("manta:request_continuations_total")) > 0)


def test_a_gateway_that_is_stopped_for_a_while_costs_no_answer(server: Server, calm: Calm) -> None:
    """It finishes what is no stream, and learns that clients have taken their streams elsewhere."""
    victim = server.processes("gateway")[0].pid

    def strike() -> None:
        os.kill(victim, signal.SIGSTOP)
        threading.Timer(STOPPED_S, os.kill, (victim, signal.SIGCONT)).start()

    answers = answers_under(server, calm, "gateway stopped", strike, IMPATIENT_S)
    assert any(answer.resumed for answer in answers), "no stream was at that gateway"


def test_the_kv_host_that_was_stopped_is_started_again(server: Server) -> None:
    until(server.complete)


def test_a_stopped_replica_is_found_and_its_streams_go_on_within_seconds(server: Server, calm: Calm) -> None:
    victim = server.processes("replica")[0].pid
    moments: list[float] = []

    def strike() -> None:
        os.kill(victim, signal.SIGSTOP)
        moments.append(time.monotonic())

    try:
        answers = answers_under(server, calm, "replica stopped", strike)
    finally:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    continued = server.continued()
    gaps = [
        gap
        for answer, expected in zip(answers, calm.answers, strict=True)
        if answer.id in continued and (gap := answer.gap(moments[0], expected.first_s)) is not None
    ]
    assert 2.0 < max(gaps) < NOTICED_S + MARGIN_S
