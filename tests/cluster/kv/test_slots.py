"""The accounting of slots under random use: it always balances, and leaves go first."""

from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from cluster.kv.slots import Page, SlotError, SlotTable

HOST = "host"


def key(name: str) -> bytes:
    return name.encode().ljust(32, b".")


def fill(table: SlotTable, *names: str) -> list[Page]:
    """Commits pages named after their sequence: "abc" follows "ab"."""
    pages = []
    for name in names:
        (slot,), _ = table.grant(HOST, 1)
        page = table.commit(HOST, slot, key(name), key(name[:-1]) if name[:-1] else b"", crc=len(name))
        assert page is not None
        pages.append(page)
    return pages


def names(pages: list[Page]) -> list[str]:
    return [page.key.rstrip(b".").decode() for page in pages]


def test_free_slots_go_before_pages_and_the_least_recently_used_pages_first() -> None:
    table = SlotTable(4)
    fill(table, "a", "b", "c")
    table.pin("reader", 1, key("a"))
    table.release("reader", 1)
    slots, gone = table.grant("writer", 3)
    assert len(set(slots)) == 3 and names(gone) == ["b", "c"]
    assert table.get(key("a")) is not None and table.get(key("b")) is None


def test_a_sequence_goes_from_its_end_whenever_its_pages_came() -> None:
    table = SlotTable(5)
    fill(table, "a", "ab", "abc")
    fill(table, "x", "xy")
    _, gone = table.grant("writer", 5)
    assert names(gone) == ["abc", "ab", "a", "xy", "x"]


def test_a_beginning_that_two_sequences_share_stays_with_the_one_used_last() -> None:
    table = SlotTable(4)
    fill(table, "a", "ab", "x", "ac")
    _, gone = table.grant("writer", 4)
    assert names(gone) == ["ab", "x", "ac", "a"]


def test_pinned_pages_stay_and_their_sequence_with_them() -> None:
    table = SlotTable(3)
    fill(table, "a", "ab", "x")
    table.pin("reader", 1, key("ab"))
    assert names(table.grant("writer", 3)[1]) == ["x"]
    table.release("reader", 1)
    assert names(table.grant("writer", 3)[1]) == ["ab", "a"]


def test_a_page_that_is_here_already_gives_its_slot_back() -> None:
    table = SlotTable(2)
    (page,) = fill(table, "a")
    (slot,), _ = table.grant("other", 1)
    assert table.commit("other", slot, key("a"), b"", 1) is None
    assert table.num_free == 1 and table.get(key("a")) is page


def test_only_the_owner_of_a_slot_commits_it_and_once() -> None:
    table = SlotTable(2)
    (slot,), _ = table.grant("one", 1)
    with pytest.raises(SlotError, match=f"slot {slot} was not granted"):
        table.commit("other", slot, key("a"), b"", 1)
    table.commit("one", slot, key("a"), b"", 1)
    with pytest.raises(SlotError, match="was not granted"):
        table.commit("one", slot, key("b"), b"", 1)
    (slot,), _ = table.grant("one", 1)
    with pytest.raises(SlotError, match="follows itself"):
        table.commit("one", slot, key("c"), key("c"), 1)


def test_a_discarded_page_is_found_no_more_but_kept_for_those_who_read_it() -> None:
    table = SlotTable(1)
    fill(table, "a")
    table.pin("reader", 7, key("a"))
    assert table.discard(key("a")) is not None
    assert table.pin("other", 1, key("a")) is None and table.discard(key("a")) is None
    assert table.grant("writer", 1) == ([], [])
    assert len(table.release("reader", 7)) == 1
    table.check_integrity()
    assert len(table.grant("writer", 1)[0]) == 1


def test_a_page_that_leaves_can_be_found_and_stays_if_it_is() -> None:
    table = SlotTable(3)
    fill(table, "a", "ab", "abc")
    leaving = table.start_leaving(2)
    assert names(leaving) == ["abc", "ab"]
    assert names(table.grant("writer", 3)[1]) == ["a"], "those that leave are not taken"
    assert table.pin("reader", 1, key("abc")) is leaving[0]
    assert not table.finish_leaving(leaving[0], go=True)
    assert table.finish_leaving(leaving[1], go=True)
    table.check_integrity()
    assert table.num_pages == 1 and table.num_free == 1


def test_a_page_that_could_not_leave_is_next_again() -> None:
    table = SlotTable(2)
    fill(table, "a", "ab")
    for page in table.start_leaving(2):
        assert not table.finish_leaving(page, go=False)
    table.check_integrity()
    assert names(table.grant("writer", 2)[1]) == ["ab", "a"]


def test_a_slot_without_memory_is_never_granted_again() -> None:
    table = SlotTable(2)
    slots, _ = table.grant("one", 2)
    table.retire("one", slots[0])
    table.give_back("one", slots[1])
    table.check_integrity()
    assert table.grant("two", 2) == ([slots[1]], [])


class Use(RuleBasedStateMachine):
    """Owners that write, find, let go and vanish, against a plain model of what each has."""

    OWNERS: ClassVar[list[str]] = ["one", "two", HOST]
    NAMES: ClassVar[list[str]] = ["a", "ab", "abc", "abd", "x", "xy", "xyz"]
    granted: Bundle[tuple[str, int]] = Bundle("granted")
    leaving: Bundle[Page] = Bundle("leaving")

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(6)
        self.held: dict[str, set[int]] = {owner: set() for owner in self.OWNERS}
        self.pinned: dict[tuple[str, int], list[Page]] = {}
        self.tickets = 0

    @rule(target=granted, owner=st.sampled_from(OWNERS), count=st.integers(0, 4))
    def grant(self, owner: str, count: int):
        free, present = self.table.num_free, {page.key for page in self.table.pages()}
        slots, gone = self.table.grant(owner, count)
        assert len(gone) == max(0, len(slots) - free)
        for page in gone:
            present.remove(page.key)
            assert not page.pins and not page.leaving
            followers = [other for other in self.table.pages() if other.parent == page.key and not other.leaving]
            assert not followers, "a page went before one that follows it"
        assert not any(set(slots) & held for held in self.held.values())
        self.held[owner] |= set(slots)
        return multiple(*((owner, slot) for slot in slots))

    @rule(grant=consumes(granted), name=st.sampled_from(NAMES))
    def commit(self, grant: tuple[str, int], name: str) -> None:
        owner, slot = grant
        if slot not in self.held[owner]:
            return
        self.held[owner].remove(slot)
        known = self.table.get(key(name))
        page = self.table.commit(owner, slot, key(name), key(name[:-1]) if name[:-1] else b"", 0)
        assert (page is None) == (known is not None)
        assert self.table.get(key(name)) is (known or page)

    @rule(owner=st.sampled_from(OWNERS), wanted=st.lists(st.sampled_from(NAMES), max_size=3))
    def find(self, owner: str, wanted: list[str]) -> None:
        self.tickets += 1
        found = [self.table.pin(owner, self.tickets, key(name)) for name in wanted]
        self.pinned[owner, self.tickets] = [page for page in found if page is not None]

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.pinned:
            owner, ticket = data.draw(st.sampled_from(sorted(self.pinned)))
            del self.pinned[owner, ticket]
            self.table.release(owner, ticket)

    @rule(owner=st.sampled_from(OWNERS))
    def end(self, owner: str) -> None:
        self.table.end(owner)
        self.held[owner] = set()
        self.pinned = {place: pages for place, pages in self.pinned.items() if place[0] != owner}

    @rule(name=st.sampled_from(NAMES))
    def discard(self, name: str) -> None:
        self.table.discard(key(name))
        assert self.table.get(key(name)) is None

    @rule(target=leaving, count=st.integers(1, 3))
    def start_leaving(self, count: int):
        return multiple(*self.table.start_leaving(count))

    @rule(page=consumes(leaving), go=st.booleans())
    def finish_leaving(self, page: Page, go: bool) -> None:
        gone = self.table.finish_leaving(page, go=go)
        assert (self.table.get(page.key) is page) == (page.indexed and not gone)

    @invariant()
    def everything_balances(self) -> None:
        self.table.check_integrity()
        for pages in self.pinned.values():
            slots = {page.slot for page in pages}
            assert not any(slots & held for held in self.held.values()), "a slot that someone reads can be written to"


TestUse = Use.TestCase
TestUse.settings = settings(max_examples=150, stateful_step_count=40)


@given(order=st.permutations(["a", "ab", "abc", "abd", "x", "xy"]))
def test_in_whatever_order_pages_come_no_page_goes_before_its_followers(order: list[str]) -> None:
    table = SlotTable(6)
    fill(table, *order)
    gone = names(table.grant("writer", 6)[1])
    assert sorted(gone) == sorted(order)
    assert all(gone.index(name) < gone.index(name[:-1]) for name in gone if name[:-1])
