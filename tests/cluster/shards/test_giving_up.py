"""Loads of a group that are given up: they end with what all ranks have, once no rank writes to a page any more."""

import random
import time
from collections.abc import Callable
from itertools import chain, repeat

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.shards.tier import GroupTier
from engine.config import SchedulerConfig
from engine.engine import Engine
from engine.kv.pages import PagePool
from engine.kv.tier import Answer, Load, Loaded
from engine.limits import Limits
from engine.scheduler import Scheduler
from tests.cluster.kv.answers import answers_of
from tests.cluster.shards.group_tiers import (
    KEYS,
    PAGE_TOKENS,
    PAGES,
    AllRanks,
    filled,
    group_of,
    is_quiet,
    until,
)
from tests.engine.fake_tier import FakeTier
from tests.engine.fakes import VOCAB, LedgerRunner, Streams
from tests.engine.rig import check_pages, expected, request

PATIENCE_S = 20.0


class ByHand(FakeTier):
    """Has everything, and brings pages when the test says so; stops when it is told to, unless it cannot."""

    def __init__(self, num_pages: int = 0) -> None:
        super().__init__()
        self.num_pages = num_pages
        """Of the load, that have come."""
        self.is_stuck = False
        self.load_: Load | None = None

    def load(self, load: Load) -> None:
        self.load_, self._copied = load, 0
        self.given_up = [ticket for ticket in self.given_up if ticket != load.ticket]

    def poll(self, timeout_s: float = 0.0) -> list[Answer]:
        load = self.load_
        if load is None:
            return []
        while self._copied < min(self.num_pages, len(load.pages)):
            self._runner.fill(load.pages[self._copied], [self._copied] * PAGE_TOKENS)
            self._copied += 1
        if self._copied < len(load.pages) and (self.is_stuck or load.ticket not in self.given_up):
            return []
        self.load_ = None
        return [Loaded(load.ticket, self._copied)]


def asked(ticket: int) -> Load:
    return Load(ticket, KEYS[:6], [10, 11, 12, 13, 14, 15], lambda count: 6.0 - count)


def test_a_load_that_is_given_up_ends_with_the_pages_that_all_ranks_have() -> None:
    clients = [ByHand(3), ByHand(1), ByHand(6)]
    runners = [filled(client) for client in clients]
    with group_of(*clients) as made:
        until(made, lambda: made.host() > 0)
        made.load(asked(7))
        assert is_quiet(made)
        made.give_up(7)
        assert answers_of(made, 1) == [Loaded(7, 1, recompute_seconds=1.0)]
        assert made.stats().pages_loaded == 1
        for runner in runners:
            for page in range(10, 16):
                runner.fill(page, [99, 99])
        for client in clients:
            client.num_pages = 6
        assert is_quiet(made)
    assert all(runner.page(page) == [99, 99] for runner in runners for page in range(10, 16)), "they are another's now"


def test_its_pages_are_not_given_back_before_the_last_rank_has_stopped() -> None:
    clients = [ByHand(3), ByHand(2)]
    for client in clients:
        filled(client)
    clients[1].is_stuck = True
    with group_of(*clients) as made:
        until(made, lambda: made.host() > 0)
        made.load(asked(7))
        made.give_up(7)
        assert is_quiet(made), "a rank may still write"
        made.give_up(7)
        clients[1].num_pages = 4
        clients[1].is_stuck = False
        assert answers_of(made, 1) == [Loaded(7, 3, recompute_seconds=3.0)]
        assert [len(client.given_up) for client in clients] == [1, 1], "each is told once"


def test_what_is_over_is_not_given_up_and_neither_is_the_next_load_of_that_ticket() -> None:
    clients = [ByHand(6), ByHand(6)]
    for client in clients:
        filled(client)
    with group_of(*clients) as made:
        until(made, lambda: made.host() > 0)
        made.give_up(7)
        made.load(asked(7))
        assert answers_of(made, 1) == [Loaded(7, 6, recompute_seconds=6.0)]
        made.give_up(7)
        for client in clients:
            client.num_pages = 2
        made.load(asked(7))
        assert is_quiet(made)
        made.give_up(7)
        assert answers_of(made, 1) == [Loaded(7, 2, recompute_seconds=2.0)]
        for client in clients:
            client.num_pages = 5
        made.load(asked(7))
        assert is_quiet(made)
        for client in clients:
            client.num_pages = 6
        assert answers_of(made, 1) == [Loaded(7, 6, recompute_seconds=6.0)]


def test_what_one_rank_has_nothing_of_is_not_waited_for() -> None:
    clients = [ByHand(3), FakeTier(), ByHand(3)]
    for client in clients:
        filled(client)
    with group_of(*clients) as made:
        until(made, lambda: made.host() > 0)
        made.load(asked(7))
        assert [(answer.ticket, answer.num_pages) for answer in answers_of(made, 1)] == [(7, 0)]


class Group:
    """An engine whose pages overflow to a group's tier."""

    def __init__(self, made: GroupTier, clients: list[FakeTier], depth: int, num_pages: int = PAGES) -> None:
        runners = [LedgerRunner(num_pages, PAGE_TOKENS) for _ in clients]
        for client, runner in zip(clients, runners, strict=True):
            client.attach(runner)
        until(made, lambda: made.host() > 0)
        config = SchedulerConfig(max_sequences=8, max_batch_tokens=24)
        self.scheduler = Scheduler(config, PagePool(num_pages), PAGE_TOKENS, tier=made, depth=depth)
        self.engine = Engine(self.scheduler, AllRanks(runners, depth), Limits(num_pages * PAGE_TOKENS, VOCAB))
        self.streams = Streams()

    def step(self) -> None:
        self.streams.take(self.engine.step())
        check_pages(self.scheduler)

    def run(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.engine.has_work():
            self.step()
            assert time.monotonic() < deadline, "the engine does not come to an end"
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_pages


class LoadsLate(FakeTier):
    """Answers a load after so many polls, and what is to be saved at once."""

    def __init__(self, polls: Callable[[], int], choose: Callable[[int], int] = lambda count: count) -> None:
        super().__init__(choose=choose)
        self._polls = polls

    def load(self, load: Load) -> None:
        self.slow_down(self._polls())
        super().load(load)
        self.slow_down(0)


def test_nobody_waits_for_the_pages_of_a_load_that_does_not_end() -> None:
    prompt = list(range(30))
    clients = [FakeTier(), LoadsLate(chain([1_000_000], repeat(0)).__next__)]
    with group_of(*clients) as made:
        group = Group(made, clients, depth=1, num_pages=20)
        for name, tokens in (("saved", prompt), ("takes its place", [70] * 38)):
            group.engine.add(request(name, tokens, max_tokens=1))
            group.run()
        group.engine.add(request("early", [80, 81], max_tokens=30))
        group.step()
        group.engine.add(request("late", prompt, max_tokens=3))
        group.step()
        group.run()
        assert group.streams.tokens["early", 0] == expected([80, 81], 30)
        assert group.streams.tokens["late", 0] == expected(prompt, 3)
        assert len(clients[1].given_up) == 1


@settings(max_examples=6)
@given(seed=st.integers(0, 2**32), ranks=st.integers(1, 3), depth=st.integers(1, 3))
def test_giving_up_at_any_time_changes_no_token_and_leaves_no_page(seed: int, ranks: int, depth: int) -> None:
    """Requests are aborted amid loads of which each rank's end is late, and each page's references balance always."""
    chance = random.Random(seed)
    chances = [random.Random(seed + rank) for rank in range(ranks)]
    clients = [
        LoadsLate(
            polls=lambda its=its: its.choice([0, 2, 20]),
            choose=lambda count, its=its: its.randint(count // 2, count),
        )
        for its in chances
    ]
    stems = [[chance.randrange(90) for _ in range(chance.randint(8, 14))] for _ in range(4)]
    with group_of(*clients) as made:
        group = Group(made, clients, depth, num_pages=16)
        wanted = {}
        for number in range(20):
            prompt = [*chance.choice(stems), number]
            wanted[str(number), 0] = expected(prompt, 10)
            group.engine.add(request(str(number), prompt, max_tokens=10))
            for _ in range(chance.randint(0, 15)):
                group.step()
            if chance.random() < 0.4:
                gone = str(number - chance.randrange(3))
                group.engine.abort(gone)
                wanted.pop((gone, 0), None)
        group.run()
        for name, tokens in wanted.items():
            assert group.streams.tokens[name] == tokens
