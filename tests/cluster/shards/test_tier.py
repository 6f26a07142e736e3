"""Pages of a group overflow as those of one rank would: there when all parts are, and whatever goes wrong with one part
costs time alone."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgpack
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kv.wire import WireError
from cluster.shards.door import Doors
from cluster.shards.tier import GroupTier, RankTier
from cluster.shards.tier_wire import Fetch, Fetched, News, Saved, Saves, State, decode, encode
from engine.batch import Batch, StepOutput
from engine.config import SchedulerConfig
from engine.engine import Engine
from engine.kv import tier
from engine.kv.pages import PagePool
from engine.kv.tier import Answer, Load, Loaded, Save
from engine.limits import Limits
from engine.scheduler import Scheduler
from tests.engine.fake_tier import Contents, FakeTier, at_random
from tests.engine.fakes import VOCAB, LedgerRunner, run_to_end
from tests.engine.rig import expected, request

PATIENCE_S = 5.0
KEYS = [bytes([index]) * 32 for index in range(1, 9)]
PAGES, PAGE_TOKENS = 24, 2


@contextmanager
def group_of(*clients: FakeTier) -> Iterator[GroupTier]:
    """A group's tier over those of its ranks, once it has heard of all."""
    with TemporaryDirectory() as folder, zmq.Context() as context:
        doors = Doors(context, [True] * len(clients), "127.0.0.1", Path(folder))
        failures: list[Exception] = []
        ranks = [
            RankTier(door.connect(context, door.pages), client, failures.append)
            for door, client in zip(doors.of_ranks, clients, strict=True)
        ]
        made = GroupTier(doors.pages)
        try:
            yield made
        finally:
            for rank in ranks:
                rank.close()
            for socket in (*doors.work, *doors.pulse, *doors.pages):
                socket.close()
            doors.close()
        assert failures == []


def until(made: GroupTier, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        assert made.poll(0.01) == []


def answers(made: GroupTier, count: int) -> list[Answer]:
    found: list[Answer] = []
    deadline = time.monotonic() + PATIENCE_S
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} answers of {count}"
        found += made.poll(0.01)
    return found


def filled(client: FakeTier) -> LedgerRunner:
    """A rank's pages; page n holds the number n."""
    runner = LedgerRunner(16, PAGE_TOKENS)
    for page in range(16):
        runner.fill(page, [page, page])
    client.attach(runner)
    return runner


def test_a_page_is_saved_once_all_ranks_have_and_refused_if_one_has_not() -> None:
    clients = [FakeTier(), FakeTier(delay=lambda: 3), FakeTier(takes=iter([True, False]).__next__)]
    for client in clients:
        filled(client)
    with group_of(*clients) as made:
        until(made, lambda: made.host() > 0)
        made.save([Save(KEYS[0], b"", 3), Save(KEYS[1], KEYS[0], 4)])
        assert sorted(answers(made, 2), key=str) == [tier.Saved(3, True), tier.Saved(4, False)]
        assert made.may_have(KEYS[0]) and not made.may_have(KEYS[1])
        assert (made.stats().pages_saved, made.stats().pages_refused) == (1, 1)


def test_as_many_pages_are_loaded_as_the_rank_that_has_fewest() -> None:
    clients = [FakeTier(), FakeTier(choose=lambda count: min(count, 2)), FakeTier()]
    runners = [filled(client) for client in clients]
    with group_of(*clients) as made:
        until(made, lambda: made.room() >= 3)
        parents = [b"", *KEYS]
        made.save([Save(key, parent, page) for page, (key, parent) in enumerate(zip(KEYS[:3], parents, strict=False))])
        answers(made, 3)
        made.load(Load(7, KEYS[:3], [10, 11, 12], lambda count: 9.0 - count))
        assert answers(made, 1) == [Loaded(7, 2, 2.0, 1.0, 2.0)]
    for runner in runners:
        assert [runner.page(page) for page in (10, 11)] == [[0, 0], [1, 1]]


def test_another_host_of_any_rank_is_another_host() -> None:
    clients = [FakeTier(), FakeTier()]
    for client in clients:
        filled(client)
    with group_of(*clients) as made:
        assert made.host() == 0 and made.room() == 0, "before anything is heard of the ranks"
        until(made, lambda: made.host() > 0)
        made.save([Save(KEYS[0], b"", 3)])
        answers(made, 1)
        first = made.host()
        clients[1].end_host()
        until(made, lambda: made.host() == 0)
        clients[1].start_host()
        until(made, lambda: made.host() > first)
        assert not made.may_have(KEYS[0]), "what the one before had is gone"


class AllRanks:
    """Ranks in this process, every one of which runs every batch, `depth` of them in flight."""

    failure = None

    def __init__(self, runners: list[LedgerRunner], depth: int) -> None:
        self.depth = depth
        self._runners = runners
        self._outputs: deque[StepOutput] = deque()

    def submit(self, batch: Batch) -> None:
        self._outputs.append([runner.run(batch) for runner in self._runners][-1])

    def collect(self) -> StepOutput:
        return self._outputs.popleft()

    def close(self) -> None:
        pass


@settings(max_examples=6)
@given(seed=st.integers(0, 2**32), ranks=st.integers(1, 3), depth=st.integers(1, 3))
def test_no_disturbance_of_a_rank_s_tier_changes_a_token(seed: int, ranks: int, depth: int) -> None:
    """Each rank's is slow and unreliable in its own way, and the second engine finds what the first has left."""
    contents: list[Contents] = [{} for _ in range(ranks)]
    for round_ in range(2):
        clients = [at_random(seed + 10 * round_ + rank, contents[rank]) for rank in range(ranks)]
        runners = [LedgerRunner(PAGES, PAGE_TOKENS) for _ in clients]
        for client, runner in zip(clients, runners, strict=True):
            client.attach(runner)
        with group_of(*clients) as made:
            until(made, lambda made=made: made.host() > 0)
            config = SchedulerConfig(max_sequences=8, max_batch_tokens=24)
            scheduler = Scheduler(config, PagePool(PAGES), PAGE_TOKENS, tier=made, depth=depth)
            engine = Engine(scheduler, AllRanks(runners, depth), Limits(PAGES * PAGE_TOKENS, VOCAB))
            prompts = [[index % 3] * (4 + index) for index in range(8)]
            for index, prompt in enumerate(prompts):
                engine.add(request(str(index), prompt, max_tokens=10))
            streams = run_to_end(engine)
            for index, prompt in enumerate(prompts):
                assert streams.tokens[str(index), 0] == expected(prompt, 10)
            assert scheduler.pool.num_free == PAGES


keys = st.binary(min_size=32, max_size=32)
numbers = st.integers(0, 2**62)
seconds = st.floats(0, 1e6)
states = st.builds(State, numbers, numbers, numbers, seconds, numbers, numbers)
news = st.builds(
    News,
    st.lists(st.builds(Saved, numbers, st.booleans()), max_size=3).map(tuple),
    st.lists(st.builds(Fetched, numbers, numbers, seconds, seconds), max_size=3).map(tuple),
    states,
)
saves = st.builds(Saves, st.lists(st.builds(Save, keys, keys | st.just(b""), numbers), max_size=3).map(tuple))


@given(message=news | saves)
def test_what_is_said_of_pages_arrives(message: News | Saves) -> None:
    assert decode(encode(message)) == message


@given(ticket=numbers, pages=st.lists(st.tuples(keys, numbers), max_size=4))
def test_what_is_asked_for_arrives(ticket: int, pages: list[tuple[bytes, int]]) -> None:
    recompute = np.arange(len(pages) + 1, dtype=np.float64)
    sent = Fetch(ticket, tuple(key for key, _ in pages), tuple(page for _, page in pages), recompute)
    got = decode(encode(sent))
    assert isinstance(got, Fetch)
    assert (got.ticket, got.keys, got.pages) == (sent.ticket, sent.keys, sent.pages)
    assert got.recompute.tolist() == recompute.tolist()


@given(data=st.binary(max_size=100), message=news | saves, place=st.integers(0, 3), other=st.integers() | st.binary())
def test_what_is_no_message_is_refused(data: bytes, message: News | Saves, place: int, other: int | bytes) -> None:
    content = msgpack.unpackb(encode(message))
    content[min(place, len(content) - 1)] = other if not isinstance(other, int) else other % 2**63
    for each in (data, msgpack.packb(content)):
        try:
            assert isinstance(decode(each), News | Saves | Fetch)
        except WireError:
            continue


@pytest.mark.parametrize("keys", [b"", b"x" * 31, b"x" * 64])
def test_pages_and_keys_are_as_many(keys: bytes) -> None:
    with pytest.raises(WireError, match="not as many keys"):
        decode(msgpack.packb([1, 0, keys, bytes(8), bytes(16)]))
