"""Who holds which page of the KV cache. Accounting only: knows no tensor, no sequence and no policy."""

from collections.abc import Iterable, Sequence

from engine.errors import PoolExhausted
from engine.kv.prefix import PrefixIndex


class PagePool:
    """A fixed number of device pages with reference counts.

    A page that nobody holds is empty, or idle: its content is indexed, and stays findable until the page is needed.
    Idle pages are evicted in the order in which they were let go, the last pages of a sequence first. Whoever finds a
    page finds those before it too, so a page is never let go later than the one before it in its sequence: leaves go
    first, without a tree.

    Invariant: a page is empty or idle exactly when its count is zero, so empty, idle and held pages always sum to
    `num_pages`. Several sequences may hold one page; its contents are then read-only.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool needs at least one page, got {num_pages}")
        self.num_pages = num_pages
        self.index = PrefixIndex()
        self._counts = [0] * num_pages
        # A stack: the page freed last is the likeliest to be warm in the cache of the CPU.
        self._empty = list(range(num_pages - 1, -1, -1))
        # Oldest first; the values mean nothing.
        self._idle: dict[int, None] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._empty) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Those of them whose content can still be found."""
        return len(self._idle)

    def count_idle(self, pages: Iterable[int]) -> int:
        """How many of these pages nobody holds: sharing them leaves as many fewer to allocate."""
        return sum(page in self._idle for page in pages)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, each with one reference. Raises PoolExhausted, having taken none."""
        if count > self.num_free:
            raise PoolExhausted(f"{count} pages asked for, {self.num_free} of {self.num_pages} are free")
        pages = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for page in pages:
            self._counts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds a reference to pages that are held or idle."""
        for page in pages:
            if self._counts[page] == 0:
                assert page in self._idle, f"page {page} is empty and cannot be shared"
                del self._idle[page]
            self._counts[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drops a reference to each page, in the order of a sequence; pages that nobody holds any more become free."""
        for page in reversed(pages):
            assert self._counts[page] > 0, f"page {page} was released more often than it was held"
            self._counts[page] -= 1
            if self._counts[page] > 0:
                continue
            if page in self.index:
                self._idle[page] = None
            else:
                self._empty.append(page)

    def num_holders(self, page: int) -> int:
        """How many references there are to a page."""
        return self._counts[page]

    def check_integrity(self, holders: Iterable[Iterable[int]]) -> None:
        """Asserts that the counts are exactly the references that `holders` have. For tests and idle moments."""
        counts = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                counts[page] += 1
        assert counts == self._counts, "reference counts differ from what is held"
        empty = set(self._empty)
        assert len(empty) == len(self._empty), "a page is on the list of empty ones twice"
        assert not empty & self._idle.keys(), "a page is both empty and idle"
        assert empty | self._idle.keys() == {page for page, count in enumerate(counts) if count == 0}, "free is wrong"
        assert all(page in self.index for page in self._idle), "an idle page cannot be found"
        assert not any(page in self.index for page in empty), "an empty page is indexed"
        self.index.check_integrity()

    def _evict(self) -> int:
        """The page that was let go first, without its content."""
        page = next(iter(self._idle))
        del self._idle[page]
        self.index.forget(page)
        return page
