"""A gateway's backend over real replicas in this process: who goes on with what when replicas come and go."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest
from ray.exceptions import ActorUnavailableError

from deployments import silence, token_streams
from deployments.backend import GenerationFailed, Loss, ModelGone, ReplicaLost
from deployments.continuation import ContinuingBackend
from deployments.messages import Submit
from deployments.replica import identity_of
from deployments.router import ReplicaGone
from deployments.token_streams import TokenStream
from engine.config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.sequence import Emission, FinishReason, Request
from tests.deployments.in_process import Setting, expected, run, tokens, until

Scenario = Callable[[Setting], Awaitable[None]]
Run = Callable[[Scenario], None]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    return lambda scenario: run(monkeypatch, tmp_path, scenario)


class Reading:
    """A request and what comes of it, through the backend that goes on elsewhere."""

    def __init__(self, setting: Setting, request: Request) -> None:
        self.request = request
        self.emissions: list[Emission] = []
        self.interruptions: list[str] = []
        self._backend = ContinuingBackend(setting.backend, timeout_s=20, count=self.interruptions.append)
        self.done = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with aclosing(self._backend.generate(self.request)) as stream:
            async for emission in stream:
                self.emissions.append(emission)

    async def begun(self, count: int = 10) -> None:
        await until(lambda: len(self.emissions) >= count or self.done.done())

    async def is_exact(self) -> bool:
        await self.done
        return tokens(self.emissions) == expected(self.request)


def test_streams_of_a_replica_that_is_to_go_move_to_another_one_of_the_same_model(play: Run) -> None:
    async def scenario(setting: Setting) -> None:
        await setting.deployment.start("a")
        reading = Reading(setting, await setting.request(max_tokens=600))
        await reading.begun()
        await setting.deployment.start("b")
        setting.deployment.list("b")
        assert await reading.is_exact()
        assert setting.places("a", "b") == [1, 1]
        assert reading.interruptions == ["moved"]

    play(scenario)


def test_they_stay_with_their_model_when_only_another_one_is_left(play: Run) -> None:
    async def scenario(setting: Setting) -> None:
        await setting.deployment.start("old")
        reading = Reading(setting, await setting.request(max_tokens=600))
        await reading.begun()
        await setting.deployment.start("new", model="two")
        setting.deployment.list("new")
        assert await reading.is_exact()
        assert setting.places("old", "new") == [1, 0]
        assert reading.interruptions == []

    play(scenario)


def test_a_stream_whose_model_is_gone_ends_with_an_error_and_not_with_words_of_another_one(play: Run) -> None:
    async def scenario(setting: Setting) -> None:
        await setting.deployment.start("old")
        reading = Reading(setting, await setting.request())
        await reading.begun()
        await setting.deployment.start("new", model="two")
        setting.deployment.list("new")
        setting.deployment.faults["old"] = ActorUnavailableError("killed", None)
        with pytest.raises(ModelGone):
            await reading.done
        brought = tokens(reading.emissions)
        assert brought == expected(reading.request)[: len(brought)]
        assert setting.places("new") == [0]

    play(scenario)


def test_a_replica_refuses_requests_for_another_model_and_says_what_it_serves(play: Run) -> None:
    async def scenario(setting: Setting) -> None:
        replica = await setting.deployment.start("a")
        request = await setting.request()
        answer = await replica.submit(Submit(replace(request, model="another"), "gateway", 1))
        assert (answer.replica_id, answer.card.identity) == ("a", request.model)
        assert replica.engine.taken == []

    play(scenario)


def test_new_requests_are_for_the_new_model_as_soon_as_one_replica_serves_it(play: Run) -> None:
    async def scenario(setting: Setting) -> None:
        await setting.deployment.start("old")
        old = await setting.request(max_tokens=5)
        assert await Reading(setting, old).is_exact()
        await setting.deployment.start("new", model="two")
        await setting.backend.card()
        while (await setting.backend.card()).identity == old.model:
            await asyncio.sleep(0.005)
        new = await setting.request(max_tokens=5)
        for request in (new, old):
            assert await Reading(setting, request).is_exact()
        assert setting.places("old", "new") == [2, 1], "each where its model is"
        setting.deployment.list("new")
        with pytest.raises(ModelGone):
            await Reading(setting, old).done

    play(scenario)


def test_a_replica_that_has_no_room_for_a_stream_is_left_out(play: Run) -> None:
    async def scenario(setting: Setting) -> None:
        await setting.deployment.start("roomy")
        reading = Reading(setting, await setting.request(max_tokens=600))
        await reading.begun()
        await setting.deployment.start("small", max_model_len=50)
        setting.deployment.list("small")
        # Long enough for the gateway to notice what it must not do.
        await reading.begun(100)
        assert (await setting.backend.card()).max_model_len == 50
        setting.deployment.faults["roomy"] = ActorUnavailableError("killed", None)
        await until(lambda: reading.interruptions)
        await setting.deployment.start("again")
        assert await reading.is_exact(), "it waited for a replica with room"
        assert setting.places("small", "again") == [0, 1]
        assert reading.emissions[-1].finish_reason is FinishReason.LENGTH

    play(scenario)


def test_a_client_that_leaves_before_its_request_is_placed_leaves_no_debt(play: Run) -> None:
    async def scenario(setting: Setting) -> None:
        replica = await setting.deployment.start("a")
        request = await setting.request(max_tokens=5)
        assert await Reading(setting, request).is_exact()
        setting.deployment.open.clear()
        left = [Reading(setting, await setting.request(max_tokens=900)) for _ in range(3)]
        await asyncio.sleep(0.02)
        for reading in left:
            reading.done.cancel()
        await asyncio.wait([reading.done for reading in left])
        setting.deployment.open.set()
        await until(lambda: len(replica.engine.taken) == 4)
        await until(lambda: not replica.engine.has_work())
        assert setting.backend._ledger._own == {}

    play(scenario)


def test_a_client_that_does_not_read_stops_its_request_and_gets_the_rest_when_it_does(
    play: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_streams, "MAX_BEHIND", 20)

    async def scenario(setting: Setting) -> None:
        replica = await setting.deployment.start("a", step_s=0.001)
        request = await setting.request(max_tokens=300, n=2)
        counted: list[str] = []
        backend = ContinuingBackend(setting.backend, timeout_s=20, count=counted.append)
        emissions: list[Emission] = []
        async with aclosing(backend.generate(request)) as stream:
            emissions.append(await anext(stream))
            (attempt,) = setting.backend._streams.values()
            await until(lambda: attempt.broken and not replica.engine.has_work())
            # Frames merge what several iterations brought, so one may go a little beyond.
            assert len(attempt._waiting) < 120
            assert len(replica.engine.taken) == 1
            async for emission in stream:
                emissions.append(emission)
        assert counted and set(counted) == {"paused"}
        assert len(replica.engine.taken) == 1 + len(counted)
        first = [emission for emission in emissions if emission.sample_index == 0]
        assert tokens(first) == expected(request)
        assert sum(emission.finish_reason is not None for emission in emissions) == 2

    play(scenario)


@pytest.mark.parametrize(
    ("fault", "loss"),
    [(ActorUnavailableError("killed", None), Loss.FAILED), (ReplicaGone("it has left"), Loss.GONE)],
)
def test_a_replica_that_died_may_have_died_of_a_request_and_one_that_left_did_not(
    play: Run, fault: Exception, loss: Loss
) -> None:
    async def scenario(setting: Setting) -> None:
        await setting.deployment.start("a")
        stream = setting.backend.generate(await setting.request())
        await anext(stream)
        setting.deployment.faults["a"] = fault
        with pytest.raises(ReplicaLost) as lost:
            async for _ in stream:
                pass
        assert lost.value.loss is loss

    play(scenario)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links are broken after a quarter of a second without a frame."""
    monkeypatch.setattr(silence, "TICK_S", 0.03)


async def broken(setting: Setting, name: str) -> None:
    """Returns once the gateway has given up its link to a replica, whose frames are lost from now on."""
    setting.deployment.stalled[name] = asyncio.Event()
    before = setting.backend._era
    await until(lambda: setting.backend._era > before)


async def rest_of(emissions: list[Emission], stream: AsyncGenerator[Emission, None]) -> list[int]:
    emissions += [emission async for emission in stream]
    return tokens(emissions)


def test_a_stream_whose_link_broke_has_no_hole_when_its_replica_comes_back(play: Run, impatient: None) -> None:
    """Its reader was slow: it asks for more only when later tokens have had time to arrive."""

    async def scenario(setting: Setting) -> None:
        replica = await setting.deployment.start("a")
        request = await setting.request(max_tokens=600)
        async with aclosing(ContinuingBackend(setting.backend, timeout_s=20).generate(request)) as stream:
            emissions = [await anext(stream)]
            await broken(setting, "a")
            assert replica.engine.stats().generation_tokens_total < 600, "it has more to bring"
            setting.deployment.stalled.pop("a").set()
            other = Reading(setting, await setting.request(max_tokens=600))
            await other.begun()
            assert await rest_of(emissions, stream) == expected(request)
        assert await other.is_exact()

    play(scenario)


def test_the_replica_stops_what_was_given_up_with_its_link(play: Run, impatient: None) -> None:
    async def scenario(setting: Setting) -> None:
        replica = await setting.deployment.start("a")
        async with aclosing(setting.backend.generate(await setting.request(max_tokens=900))) as stream:
            await anext(stream)
            await broken(setting, "a")
            await until(lambda: not replica.engine.has_work())
            assert replica.engine.stats().generation_tokens_total < 900

    play(scenario)


def test_a_request_whose_acceptance_arrives_after_its_first_tokens_were_lost_has_no_hole(
    play: Run, impatient: None
) -> None:
    async def scenario(setting: Setting) -> None:
        replica = await setting.deployment.start("a")
        first = Reading(setting, await setting.request(max_tokens=600))
        await first.begun()
        setting.deployment.answers.clear()
        late = Reading(setting, await setting.request(max_tokens=600))
        setting.deployment.stalled["a"] = asyncio.Event()
        await until(lambda: len(replica.engine.taken) == 2)
        await broken(setting, "a")
        setting.deployment.stalled.pop("a").set()
        setting.deployment.answers.set()
        assert await late.is_exact() and await first.is_exact()

    play(scenario)


def test_a_request_of_which_tokens_went_to_the_reader_that_has_given_up_has_no_hole(play: Run, impatient: None) -> None:
    """It came when the link was broken already, to a replica that had not heard of that."""

    async def scenario(setting: Setting) -> None:
        replica = await setting.deployment.start("a")
        async with aclosing(setting.backend.generate(await setting.request(max_tokens=900))) as first:
            await anext(first)
            await broken(setting, "a")
            setting.deployment.answers.clear()
            late = Reading(setting, await setting.request(max_tokens=300))
            await until(lambda: len(replica.engine.taken) == 2)
            await asyncio.sleep(0.05)
            setting.deployment.stalled.pop("a").set()
            setting.deployment.answers.set()
            assert await late.is_exact()

    play(scenario)


def test_nothing_is_added_to_a_stream_that_has_failed() -> None:
    async def scenario() -> None:
        stream = TokenStream("r@g", Request("r", (1, 2, 3), SamplingParams(max_tokens=9)), "g")
        assert stream.put(Emission("r@g", 0, (1,))) == 4
        stream.fail(ReplicaLost("silent", Loss.GONE))
        assert stream.put(Emission("r@g", 0, (3,), finish_reason=FinishReason.LENGTH)) == 0
        assert tokens(await stream.take()) == [1]
        with pytest.raises(ReplicaLost, match="silent"):
            await stream.take()

    asyncio.run(scenario())


def test_a_request_that_ends_replicas_before_they_take_it_fails_after_eight_of_them(play: Run) -> None:
    async def scenario(setting: Setting) -> None:
        names = [f"r{number}" for number in range(10)]
        for name in names:
            await setting.deployment.start(name)
        request = await setting.request(max_tokens=5)
        setting.deployment.deadly = names
        with pytest.raises(GenerationFailed, match="4 replicas in a row failed with this request"):
            await Reading(setting, request).done
        avoided = setting.backend._ledger._avoided
        assert len(avoided) == 8, "who died comes last from then on"
        setting.deployment.deadly = []
        assert await Reading(setting, request).is_exact()

    play(scenario)


def test_a_replica_that_dies_with_a_request_on_its_way_is_no_evidence(play: Run) -> None:
    async def scenario(setting: Setting) -> None:
        for name in ("a", "b"):
            await setting.deployment.start(name)
        request = await setting.request(max_tokens=5)
        setting.deployment.deadly = ["a"]
        readings = [Reading(setting, request) for _ in range(8)]
        assert all([await reading.is_exact() for reading in readings])
        assert not any(reading.interruptions for reading in readings)

    play(scenario)


def test_replicas_can_go_on_for_each_other_if_files_and_numbers_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = EngineConfig(model=str(tmp_path))
    identity = identity_of(config, tmp_path)
    assert identity_of(config.model_copy(update={"max_model_len": 100, "threads": 3}), tmp_path) == identity
    assert identity_of(config.model_copy(update={"quantization": "w8a8"}), tmp_path) != identity
    (tmp_path / "config.json").write_text("{ }")
    assert identity_of(config, tmp_path) != identity


def test_it_is_ready_while_any_replica_takes_requests(play: Run) -> None:
    async def scenario(setting: Setting) -> None:
        replicas = [await setting.deployment.start(name) for name in ("a", "b")]
        assert await Reading(setting, await setting.request(max_tokens=5)).is_exact()
        for replica, is_ready in zip(replicas, (True, False), strict=True):
            replica._stuck = "an iteration takes for ever"
            assert await setting.backend.ready() is is_ready

    play(scenario)
