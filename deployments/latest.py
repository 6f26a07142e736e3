"""A bounded memory of what was seen last. Knows nothing of what it remembers."""

from typing import Generic, TypeVar

K = TypeVar("K")


class Latest(Generic[K]):
    """So many of the keys that were added last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._keys: dict[K, None] = {}
        """Oldest first."""

    def __contains__(self, key: K) -> bool:
        return key in self._keys

    def add(self, *keys: K) -> None:
        """Again changes nothing, not even which is the oldest."""
        self._keys |= dict.fromkeys(keys)
        while len(self._keys) > self._most:
            del self._keys[next(iter(self._keys))]
