"""Pages of a group overflow as those of one rank would: there when all parts are, and whatever goes wrong with one part
costs time alone."""

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kv.wire import WireError
from cluster.shards.tier_wire import Fetch, Fetched, GiveUp, News, Saved, Saves, State, decode, encode
from engine.config import SchedulerConfig
from engine.engine import Engine
from engine.kv import tier
from engine.kv.pages import PagePool
from engine.kv.tier import Load, Loaded, Save
from engine.limits import Limits
from engine.scheduler import Scheduler
from tests.cluster.kv.answers import answers_of
from tests.cluster.shards.group_tiers import KEYS, PAGE_TOKENS, PAGES, AllRanks, filled, group_of, until
from tests.engine.fake_tier import Contents, FakeTier, at_random
from tests.engine.fakes import VOCAB, LedgerRunner, run_to_end
from tests.engine.rig import expected, request


def test_a_page_is_saved_once_all_ranks_have_and_refused_if_one_has_not() -> None:
    clients = [FakeTier(), FakeTier(delay=lambda: 3), FakeTier(takes=iter([True, False]).__next__)]
    for client in clients:
        filled(client)
    with group_of(*clients) as made:
        until(made, lambda: made.host() > 0)
        made.save([Save(KEYS[0], b"", 3), Save(KEYS[1], KEYS[0], 4)])
        assert sorted(answers_of(made, 2), key=str) == [tier.Saved(3, True), tier.Saved(4, False)]
        assert made.may_have(KEYS[0]) and not made.may_have(KEYS[1])
        assert (made.stats().pages_saved, made.stats().pages_refused) == (1, 1)


def test_as_many_pages_are_loaded_as_the_rank_that_has_fewest() -> None:
    clients = [FakeTier(), FakeTier(choose=lambda count: min(count, 2)), FakeTier()]
    runners = [filled(client) for client in clients]
    with group_of(*clients) as made:
        until(made, lambda: made.room() >= 3)
        parents = [b"", *KEYS]
        made.save([Save(key, parent, page) for page, (key, parent) in enumerate(zip(KEYS[:3], parents, strict=False))])
        answers_of(made, 3)
        made.load(Load(7, KEYS[:3], [10, 11, 12], lambda count: 9.0 - count))
        assert answers_of(made, 1) == [Loaded(7, 2, 2.0, 1.0, 2.0)]
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
        answers_of(made, 1)
        first = made.host()
        clients[1].end_host()
        until(made, lambda: made.host() == 0)
        clients[1].start_host()
        until(made, lambda: made.host() > first)
        assert not made.may_have(KEYS[0]), "what the one before had is gone"


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
give_ups = st.builds(GiveUp, numbers)
saves = st.builds(Saves, st.lists(st.builds(Save, keys, keys | st.just(b""), numbers), max_size=3).map(tuple))


@given(message=news | saves | give_ups)
def test_what_is_said_of_pages_arrives(message: News | Saves | GiveUp) -> None:
    assert decode(encode(message)) == message


@given(ticket=numbers, pages=st.lists(st.tuples(keys, numbers), max_size=4))
def test_what_is_asked_for_arrives(ticket: int, pages: list[tuple[bytes, int]]) -> None:
    recompute = np.arange(len(pages) + 1, dtype=np.float64)
    sent = Fetch(ticket, tuple(key for key, _ in pages), tuple(page for _, page in pages), recompute)
    got = decode(encode(sent))
    assert isinstance(got, Fetch)
    assert (got.ticket, got.keys, got.pages) == (sent.ticket, sent.keys, sent.pages)
    assert got.recompute.tolist() == recompute.tolist()


@given(
    data=st.binary(max_size=100),
    message=news | saves | give_ups,
    place=st.integers(0, 3),
    other=st.integers() | st.binary(),
)
def test_what_is_no_message_is_refused(
    data: bytes, message: News | Saves | GiveUp, place: int, other: int | bytes
) -> None:
    content = msgpack.unpackb(encode(message))
    content[min(place, len(content) - 1)] = other if not isinstance(other, int) else other % 2**63
    for each in (data, msgpack.packb(content)):
        try:
            assert isinstance(decode(each), News | Saves | Fetch | GiveUp)
        except WireError:
            continue


@pytest.mark.parametrize("keys", [b"", b"x" * 31, b"x" * 64])
def test_pages_and_keys_are_as_many(keys: bytes) -> None:
    with pytest.raises(WireError, match="not as many keys"):
        decode(msgpack.packb([1, 0, keys, bytes(8), bytes(16)]))
