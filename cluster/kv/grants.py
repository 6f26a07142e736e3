"""Whether a host lends slots to its client, and how long pages have waited for one. Knows no host and no page."""

import math
from collections.abc import Callable


class Grants:
    """Of one connection. Until the first page has waited too long, a host is taken to lend."""

    def __init__(self, patience_s: float, clock: Callable[[], float]) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._since: float | None = None
        """Since when pages have waited; None while none do."""
        self.lends = True

    def came(self) -> None:
        """The host has lent some."""
        self.lends, self._since = True, None

    def is_overdue(self, waiting: bool) -> bool:
        """Whether pages that wait now have done so for too long; then the host lends none, until some come."""
        if not waiting:
            self._since = None
        elif self._since is None:
            self._since = self._clock()
        elif self._clock() - self._since >= self._patience_s:
            self.lends, self._since = False, None
            return True
        return False

    def due(self) -> float:
        """When those that wait will have done so for too long; infinity while none do."""
        return math.inf if self._since is None else self._since + self._patience_s
