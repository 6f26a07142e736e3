"""Who holds which page of the KV cache. Accounting only: knows no tensor, no sequence and no policy."""

from collections.abc import Iterable

from engine.errors import PoolExhausted


class PagePool:
    """A fixed number of device pages with reference counts.

    Invariant: a page is on the free list exactly when its count is zero, so free pages and held pages always sum to
    `num_pages`. Several sequences may hold one page (samples of one prompt); its contents are then read-only.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool needs at least one page, got {num_pages}")
        self.num_pages = num_pages
        self._counts = [0] * num_pages
        # A stack: the page freed last is the likeliest to be warm in the cache of the CPU.
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free pages, each with one reference. Raises PoolExhausted, having taken none."""
        if count > len(self._free):
            raise PoolExhausted(f"{count} pages asked for, {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._counts[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds a reference to pages that are already held."""
        for page in pages:
            assert self._counts[page] > 0, f"page {page} is free and cannot be shared"
            self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drops a reference to each page; pages that nobody holds any more become free."""
        for page in pages:
            assert self._counts[page] > 0, f"page {page} was released more often than it was held"
            self._counts[page] -= 1
            if self._counts[page] == 0:
                self._free.append(page)

    def check_integrity(self, holders: Iterable[Iterable[int]]) -> None:
        """Asserts that the counts are exactly the references that `holders` have. For tests and idle moments."""
        counts = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                counts[page] += 1
        assert counts == self._counts, "reference counts differ from what is held"
        free = set(self._free)
        assert len(free) == len(self._free), "a page is on the free list twice"
        assert free == {page for page, count in enumerate(counts) if count == 0}, "the free list is wrong"
