"""Which device page holds which content. Knows keys and page numbers; not who holds a page, nor what a token is."""

from collections.abc import Iterable


class PrefixIndex:
    """Pages by the key of their content (`engine.kv.keys`). An indexed page is full, computed and never written again.

    Invariant: keys and pages are one to one.
    """

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: int) -> bool:
        return page in self._keys

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The pages of the longest run of keys, from the first on, that are all here."""
        pages = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def page_of(self, key: bytes) -> int | None:
        """The page that holds this; None if none is found."""
        return self._pages.get(key)

    def key_of(self, page: int) -> bytes | None:
        """What the page holds; None if it cannot be found."""
        return self._keys.get(page)

    def insert(self, key: bytes, page: int) -> bool:
        """Notes what a page holds; False if another one holds the same already, and stays the one that is found."""
        assert page not in self._keys, f"page {page} is indexed already"
        if self._pages.setdefault(key, page) != page:
            return False
        self._keys[page] = key
        return True

    def forget(self, page: int) -> None:
        """The page is about to hold something else."""
        del self._pages[self._keys.pop(page)]

    def check_integrity(self) -> None:
        """Asserts the invariant. For tests and idle moments."""
        assert self._keys == {page: key for key, page in self._pages.items()}, "keys and pages are not one to one"
