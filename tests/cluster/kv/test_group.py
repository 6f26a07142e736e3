"""The tier of a group over real clients and a real host: a load that is given up ends at once, with what has come."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from cluster.kv.client import ANSWER_TIMEOUT_S, UNLIMITED, Bandwidth, TierClient
from cluster.shards.tier import GroupTier
from engine.kv.tier import Load, Loaded, Save, Saved
from tests.cluster.kv.answers import answers_of
from tests.cluster.kv.hosts import Host, eventually
from tests.cluster.kv.test_client import PAGE_BYTES, Pages, keys_of
from tests.cluster.shards.group_tiers import group_of, is_quiet

COUNT = 20
SLOW = Bandwidth(load=PAGE_BYTES / 0.2)
"""Five pages a second."""


class Group:
    """Two ranks, each with pages of its own: half of them saved, the others to load into."""

    def __init__(self, tier: GroupTier, pages: list[Pages]) -> None:
        self.tier, self.pages = tier, pages
        self.keys = keys_of(COUNT)

    def save(self) -> None:
        eventually(lambda: self.tier.poll(0.01) == [] and self.tier.room() >= COUNT)
        parents = [b"", *self.keys]
        self.tier.save([Save(key, parents[page], page) for page, key in enumerate(self.keys)])
        assert sorted(answers_of(self.tier, COUNT), key=str) == sorted([Saved(n, True) for n in range(COUNT)], key=str)

    def load(self, first: int = 0, into: int = COUNT) -> None:
        """Begins to load what page `first` held, and those after it."""
        count = COUNT - first
        self.tier.load(Load(1, self.keys[first:], list(range(into, into + count)), lambda done: 1e6 * (count - done)))

    def loaded(self) -> Loaded:
        (answer,) = answers_of(self.tier, 1)
        assert isinstance(answer, Loaded)
        return answer


@pytest.fixture
def group(host: Host) -> Iterator[Callable[..., Group]]:
    """Makes groups whose second rank loads at this bandwidth."""
    with ExitStack() as stack:

        def make(bandwidth: Bandwidth = UNLIMITED) -> Group:
            pages = [Pages(COUNT), Pages(COUNT)]
            pages[1].bytes[:] = 255 - pages[1].bytes
            clients = [
                TierClient(lambda: host.socket, bytes([rank]) * 32, each, name="test", parts=2, bandwidth=limit)
                for rank, (each, limit) in enumerate(zip(pages, (UNLIMITED, bandwidth), strict=True))
            ]
            return Group(stack.enter_context(group_of(*clients)), pages)

        yield make


def test_a_slow_rank_s_load_ends_with_what_it_has_and_nothing_is_written_later(
    host: Host, group: Callable[..., Group]
) -> None:
    host.start("4MiB")
    made = group(SLOW)
    made.save()
    saved, before = [each.bytes[:COUNT].copy() for each in made.pages], made.pages[1].bytes[COUNT:].copy()
    made.load()
    eventually(lambda: not np.array_equal(made.pages[1].bytes[COUNT + 2], before[2]))
    began = time.monotonic()
    made.tier.give_up(1)
    count = made.loaded().num_pages
    assert time.monotonic() - began < 2.0, "the rest would have taken longer"
    assert 3 <= count < COUNT - 5
    for each, content in zip(made.pages, saved, strict=True):
        assert np.array_equal(each.bytes[COUNT : COUNT + count], content[:count])
        each.bytes[COUNT:] = 7  # they are another sequence's now
    assert is_quiet(made.tier, 1.0)
    assert all((each.bytes[COUNT:] == 7).all() for each in made.pages)


def test_what_a_silent_host_says_later_is_not_taken_for_the_next_load(host: Host, group: Callable[..., Group]) -> None:
    host.start("4MiB")
    made = group()
    made.save()
    host.send(signal.SIGSTOP)
    began = time.monotonic()
    made.load()
    assert is_quiet(made.tier, 0.2)
    made.tier.give_up(1)
    assert made.loaded().num_pages == 0
    # Of the same sequence, which has found its first pages elsewhere meanwhile.
    made.load(first=5)
    assert is_quiet(made.tier, 0.2)
    host.send(signal.SIGCONT)
    assert made.loaded().num_pages == COUNT - 5
    assert time.monotonic() - began < ANSWER_TIMEOUT_S
    for each in made.pages:
        assert np.array_equal(each.bytes[COUNT : 2 * COUNT - 5], each.bytes[5:COUNT])
    assert made.tier.stats().pages_corrupt == made.tier.stats().failures == 0
