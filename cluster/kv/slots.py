"""Who may write to which slot of a segment, which page lies in it, who needs it, and which page goes first.

Accounting only: no bytes, no sockets, no clock.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

Owner = Hashable


class SlotError(Exception):
    """Someone used a slot that was not granted to it: says which."""


@dataclass(slots=True, eq=False)
class Page:
    """A page in a slot. Read its fields; the table alone changes them."""

    slot: int
    key: bytes
    parent: bytes
    """The key of the page before it in its sequence; empty for a first page."""
    crc: int
    used: int
    """When it was last used, in the table's own time."""
    pins: int = 0
    indexed: bool = True
    """Whether it can be found by its key."""
    leaving: bool = False
    """Whether it is being written elsewhere, to go then."""
    queued: bool = False
    """Whether it has its entry in the queue of those to go."""


class SlotTable:
    """Slots that are free, granted to an owner who writes to them, or hold a page.

    Pages that nobody pins go when slots are needed, those used least recently first; but never a page before the pages
    that follow it in its sequence, which nobody could find without it: only leaves go.

    Invariant: each slot is free, granted to one owner or held by one page. A page that lost its place in the index
    while someone pinned it keeps its slot until the last pin is gone.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._granted: dict[Owner, set[int]] = {}
        self._pages: dict[bytes, Page] = {}
        self._pins: dict[Owner, dict[int, list[Page]]] = {}
        self._unindexed = 0
        self._retired = 0
        # How many pages follow each key, those that are leaving not counted.
        self._followers: Counter[bytes] = Counter()
        # Pages that might go, by when they were used. Each page has at most one entry, which may be out of date: it is
        # corrected when it comes up, so that to use a page costs nothing here.
        self._queue: list[tuple[int, int, Page]] = []
        self._ticks = itertools.count(1)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_pages(self) -> int:
        """Pages that can be found."""
        return len(self._pages)

    def num_granted(self, owner: Owner) -> int:
        """Slots that the owner may write to."""
        return len(self._granted.get(owner, ()))

    def pages(self) -> Iterator[Page]:
        """All pages that can be found, in no order."""
        return iter(self._pages.values())

    def get(self, key: bytes) -> Page | None:
        return self._pages.get(key)

    def has_followers(self, key: bytes) -> bool:
        """Whether pages that are here follow this one, wherever that is."""
        return key in self._followers

    def in_order(self, first: Iterable[bytes]) -> list[Page]:
        """All pages that can be found, each after the one that it follows: `first`, then those used last."""
        ordered: dict[bytes, Page] = {}
        latest = sorted(self._pages.values(), key=lambda page: page.used, reverse=True)
        for key in (*first, *(page.key for page in latest)):
            chain: dict[bytes, Page] = {}
            while (page := self._pages.get(key)) is not None and key not in ordered and key not in chain:
                chain[key] = page
                key = page.parent
            ordered |= reversed(chain.items())
        return list(ordered.values())

    def grant(self, owner: Owner, count: int) -> tuple[list[int], list[Page]]:
        """Up to `count` slots that the owner may write to from now on, and the pages that had to go for them."""
        slots: list[int] = []
        gone: list[Page] = []
        while len(slots) < count:
            if not self._free:
                victim = self._pop_victim()
                if victim is None:
                    break
                self._drop(victim)
                gone.append(victim)
            slots.append(self._free.pop())
        if slots:
            self._granted.setdefault(owner, set()).update(slots)
        return slots, gone

    def commit(self, owner: Owner, slot: int, key: bytes, parent: bytes, crc: int) -> Page | None:
        """The granted slot holds this page now. None if the page is here already: then the slot is free.

        Raises SlotError for a slot that was not granted to the owner, and for a page that follows itself.
        """
        if key == parent:
            raise SlotError(f"the page in slot {slot} follows itself")
        self._take_back(owner, slot)
        known = self._pages.get(key)
        if known is not None:
            known.used = next(self._ticks)
            self._free.append(slot)
            return None
        page = self._pages[key] = Page(slot, key, parent, crc, next(self._ticks))
        self._follow(page)
        self._queue_if_idle(page)
        return page

    def give_back(self, owner: Owner, slot: int) -> None:
        """The owner has not written to the slot. Raises SlotError."""
        self._take_back(owner, slot)
        self._free.append(slot)

    def retire(self, owner: Owner, slot: int) -> None:
        """There is no memory for this granted slot: nobody gets it again. Raises SlotError."""
        self._take_back(owner, slot)
        self._retired += 1

    def pin(self, owner: Owner, ticket: int, key: bytes) -> Page | None:
        """The page, if it is here: used now, and kept until the ticket is released."""
        page = self._pages.get(key)
        if page is not None:
            page.pins += 1
            page.used = next(self._ticks)
            self._pins.setdefault(owner, {}).setdefault(ticket, []).append(page)
        return page

    def release(self, owner: Owner, ticket: int) -> list[int]:
        """Drops the pins of a ticket; returns the slots that became free."""
        tickets = self._pins.get(owner, {})
        freed = []
        for page in tickets.pop(ticket, ()):
            page.pins -= 1
            if page.pins == 0 and not page.indexed:
                self._unindexed -= 1
                self._free.append(page.slot)
                freed.append(page.slot)
            else:
                self._queue_if_idle(page)
        if not tickets:
            self._pins.pop(owner, None)
        return freed

    def end(self, owner: Owner) -> list[int]:
        """The owner is gone: its slots are free, its pins dropped. Returns the slots that became free."""
        freed = sorted(self._granted.pop(owner, ()))
        self._free.extend(freed)
        for ticket in list(self._pins.get(owner, {})):
            freed += self.release(owner, ticket)
        return freed

    def discard(self, key: bytes) -> Page | None:
        """The page must not be found again; its slot is free once nobody pins it. None if it is not here."""
        page = self._pages.get(key)
        if page is not None:
            self._drop(page)
        return page

    def start_leaving(self, count: int) -> list[Page]:
        """Up to `count` pages, the next to go, in order. They can be found until `finish_leaving`, but do not go."""
        leaving: list[Page] = []
        while len(leaving) < count and (page := self._pop_victim()) is not None:
            page.leaving = True
            self._unfollow(page)
            leaving.append(page)
        return leaving

    def finish_leaving(self, page: Page, *, go: bool) -> bool:
        """Frees the slot of a page that was leaving; False if it stays: it was pinned meanwhile, or is not to `go`."""
        if not page.indexed or not page.leaving:
            return False
        page.leaving = False
        # Whether it goes or stays, it leaves this state as what it was: a page that its parent waits for.
        self._follow(page)
        if not go or page.pins:
            self._queue_if_idle(page)
            return False
        self._drop(page)
        return True

    def check_integrity(self) -> None:
        """Asserts the invariant. For tests and idle moments."""
        granted = [slot for slots in self._granted.values() for slot in slots]
        pinned = [page for tickets in self._pins.values() for pages in tickets.values() for page in pages]
        lost = {page.slot for page in pinned if not page.indexed}
        slots = [*self._free, *granted, *(page.slot for page in self._pages.values()), *lost]
        assert len(slots) == len(set(slots)), "a slot is in two states"
        assert len(slots) + self._retired == self.num_slots, "a slot is in no state"
        assert len(lost) == self._unindexed, "pages without a place in the index are not those that are pinned"
        assert all(page.pins == pinned.count(page) for page in (*self._pages.values(), *pinned)), "pins are wrong"
        assert all(page.key == key and page.indexed for key, page in self._pages.items()), "the index is wrong"
        followers = Counter(page.parent for page in self._pages.values() if page.parent and not page.leaving)
        assert followers == +self._followers and len(followers) == len(self._followers), "followers are wrong"
        queued = [page for _, _, page in self._queue]
        assert len(queued) == len(set(queued)), "a page is queued twice"
        assert all(page.queued for page in queued)
        assert all(page.queued for page in self._pages.values() if self._is_idle(page)), "an idle page cannot go"

    def _take_back(self, owner: Owner, slot: int) -> None:
        slots = self._granted.get(owner)
        if slots is None or slot not in slots:
            raise SlotError(f"slot {slot} was not granted")
        slots.remove(slot)
        if not slots:
            del self._granted[owner]

    def _is_idle(self, page: Page) -> bool:
        return page.indexed and not page.pins and not page.leaving and not self._followers[page.key]

    def _queue_if_idle(self, page: Page) -> None:
        if not page.queued and self._is_idle(page):
            page.queued = True
            heapq.heappush(self._queue, (page.used, next(self._ticks), page))

    def _pop_victim(self) -> Page | None:
        """The page to go next, off the queue; None if all are in use."""
        while self._queue:
            used, _, page = heapq.heappop(self._queue)
            page.queued = False
            if used == page.used and self._is_idle(page):
                return page
            self._queue_if_idle(page)
        return None

    def _follow(self, page: Page) -> None:
        if page.parent:
            self._followers[page.parent] += 1

    def _unfollow(self, page: Page) -> None:
        """Its parent may be a leaf now, used no earlier than this page: nobody has found this one without it."""
        if not page.parent:
            return
        self._followers[page.parent] -= 1
        if not self._followers[page.parent]:
            del self._followers[page.parent]
            parent = self._pages.get(page.parent)
            if parent is not None:
                parent.used = max(parent.used, page.used)
                self._queue_if_idle(parent)

    def _drop(self, page: Page) -> None:
        """Takes a page out of the index, and frees its slot unless someone pins it."""
        del self._pages[page.key]
        page.indexed = False
        if not page.leaving:
            self._unfollow(page)
        if page.pins:
            self._unindexed += 1
        else:
            self._free.append(page.slot)
