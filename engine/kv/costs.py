"""What it costs to compute tokens and what to copy pages, learnt from what both have cost; and the choice between them.

Pure arithmetic on seconds: knows no clock, no page and no tier.
"""

from collections.abc import Callable, Sequence

FORGET = 0.95
"""Weight of an observation when the next one comes: some twenty count."""
_PRIOR = 1e-9
GUESS = 1e-3
"""Seconds a token until something has been observed: a model of a billion parameters on two cores."""
LEAST_TOKENS = 64
"""Of an iteration that tells something of prefill: smaller ones cost what reading the weights costs."""
LEAST_PAGES = 8
"""Copied, that outweigh the guess of what it takes to copy one."""


class PrefillCost:
    """Seconds of prefill as `token * tokens + key * keys`, where keys are those that all tokens attend to, added up.

    Least squares in which old observations fade. The second term is attention's, which a long prompt feels.
    """

    def __init__(self) -> None:
        self._tt = self._tk = self._kk = _PRIOR
        self._ts = self._ks = 0.0
        self._known = False

    @property
    def known(self) -> bool:
        """Whether any iteration has been seen."""
        return self._known

    def observe(self, tokens: int, keys: int, seconds: float) -> None:
        """An iteration that ran `tokens` tokens over `keys` keys; those of few tokens are not counted."""
        if tokens < LEAST_TOKENS:
            return
        # Relative to its size, so that one long iteration does not outweigh twenty short ones.
        t, k, s = 1.0, keys / tokens, seconds / tokens
        self._tt, self._tk, self._kk = FORGET * self._tt + t, FORGET * self._tk + k, FORGET * self._kk + k * k
        self._ts, self._ks = FORGET * self._ts + s, FORGET * self._ks + k * s
        self._known = True

    def seconds(self, first: int, count: int) -> float:
        """To compute `count` tokens of a sequence from token `first` on."""
        if count <= 0:
            return 0.0
        if not self._known:
            return count * GUESS
        token, key = self._coefficients()
        return count * (token + key * (first + (count + 1) / 2))

    def _coefficients(self) -> tuple[float, float]:
        """Seconds a token and a key. Where contexts were all alike the two cannot be told apart: all is the token's."""
        determinant = self._tt * self._kk - self._tk * self._tk
        token = self._ts / self._tt
        if determinant <= 1e-3 * self._tt * self._kk:
            return token, 0.0
        key = (self._tt * self._ks - self._tk * self._ts) / determinant
        token = (self._kk * self._ts - self._tk * self._ks) / determinant
        if key < 0.0 or token < 0.0:
            return self._ts / self._tt, 0.0
        return token, key


class CopyCost:
    """Seconds to copy a page, from the latest copies, of which those of many pages count for more.

    A thread that loses its core for a moment while it copies one page must not make all pages look dear: nobody would
    load any again, and find out.
    """

    def __init__(self, guess: float) -> None:
        self._guess = guess
        self._pages = self._seconds = 0.0

    @property
    def page_seconds(self) -> float:
        guessed = max(0.0, LEAST_PAGES - self._pages)
        return (self._seconds + guessed * self._guess) / (self._pages + guessed)

    def observe(self, pages: int, seconds: float) -> None:
        """`pages` were copied in `seconds`. The guess counts for what LEAST_PAGES leave."""
        if pages <= 0:
            return
        self._pages = FORGET * self._pages + pages
        self._seconds = FORGET * self._seconds + seconds


LoadPolicy = Callable[[Sequence[float], Callable[[int], float]], int]
"""What `choose_load` is: seconds of each page, and of computing the rest, to the number of pages to load."""


def choose_load(page_seconds: Sequence[float], recompute_seconds: Callable[[int], float]) -> int:
    """How many of the pages to load, from the first on, so that loading these and computing the rest takes least.

    `page_seconds[i]` is what page i takes to load, and `recompute_seconds(n)` what is computed when n were loaded.
    Pages that cost differently (some in memory, the rest on a slow disk) are what makes a part of them the best.
    """
    best, least, loading = 0, recompute_seconds(0), 0.0
    for count, seconds in enumerate(page_seconds, 1):
        loading += seconds
        total = loading + recompute_seconds(count)
        if total < least:
            best, least = count, total
    return best
