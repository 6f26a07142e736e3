"""What leaves the device for the tier, and what comes back: the scheduler's side of `engine.kv.tier`. Imports no torch.

Full pages are copied as sequences fill them, oldest first, as fast as the tier takes them; a page that is copied has a
reference of its own until that is done. A sequence whose next pages the tier has waits for them; others run.

Each page is offered once to each host. One that comes later, or comes back, knows nothing of what sequences computed
before: which pages it was offered is kept here, so that they can be offered again.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.kv.costs import LEAST_TOKENS, PrefillCost
from engine.kv.pages import PagePool
from engine.kv.tier import Load, Loaded, Save, Saved, Tier
from engine.policy import last_after
from engine.sequence import Sequence, Status

LEAST_SAVING = 16
SAVING_SHARE = 8
"""This part of the pool, at most, is held at once by pages that are being copied; LEAST_SAVING of a small one."""
MAX_UNSAVED = 65536
"""Pages that may wait to be copied; beyond it the oldest are forgotten, as what they hold is likely to be gone soon."""
LEAST_LOOKS = 64
"""Pages that wait and may be looked up at a time: when all are offered again, a host with a disk may have most."""
ASK_S = 0.5
"""What computing must be expected to take at least for a host to be asked for pages that are not on this node. Hosts of
other nodes answer within milliseconds, or are waited for half as long as this."""
ASK_MOVED_S = 0.05
"""The same for a stream that was computed elsewhere, and so has pages elsewhere."""
OFFER_AGAIN_S = 1.0
"""Between two times that everything is offered again: a host that is too small for a sequence drops its last pages
each time."""
STARVED_S = 1.0
"""How long pages may wait for a tier that takes none before nobody is kept awake for them. Longer than a budget of
bandwidth needs to allow a page."""


class Offload:
    """Pages on their way to or from a tier. Without a tier nothing is ever on its way."""

    def __init__(
        self,
        pool: PagePool,
        page_tokens: int,
        tier: Tier | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._page_tokens = page_tokens
        self._tier = tier
        self._clock = clock
        self._unsaved: OrderedDict[int, Save] = OrderedDict()
        """By page, in the order in which they are to be copied. Their content may have gone meanwhile."""
        self._starved_since: float | None = None
        """Since when none of them is taken although nothing is on its way."""
        self._saving: set[int] = set()
        """Pages with a reference of ours."""
        self._host = 0
        """The host that pages are offered to, as `Tier.host` numbers them."""
        self._offered: set[int] = set()
        """Pages that this host was offered, or gave."""
        self._offer_again_at = -math.inf
        """When everything may be offered again."""
        self._loading: dict[int, _Loading] = {}
        self._unscored: set[int] = set()
        """Loads of which no score is kept: those that were decided on before anything was known of what computing
        costs, and those that were given up."""
        self.prefill = PrefillCost()
        self.score = Score()

    @property
    def busy(self) -> bool:
        """Whether something is on its way, or waits to be and may soon."""
        return bool(self._loading or self._saving or (self._unsaved and not self._is_starved()))

    @property
    def held_pages(self) -> set[int]:
        """Pages of the pool that have a reference because they are being copied."""
        return self._saving

    def is_loading(self, sequence: Sequence) -> bool:
        """Whether pages of it are on their way from the tier."""
        return sequence.sequence_id in self._loading

    def totals(self) -> dict[str, Any]:
        """The fields of `EngineStats` that are this one's."""
        if self._tier is None:
            return {}
        tier, score = self._tier.stats(), self.score
        return {
            "tier_pages_saved_total": tier.pages_saved,
            "tier_pages_refused_total": tier.pages_refused,
            "tier_pages_loaded_total": tier.pages_loaded,
            "tier_pages_corrupt_total": tier.pages_corrupt,
            "tier_failures_total": tier.failures,
            "tier_load_seconds_total": score.actual,
            "tier_load_predicted_seconds_total": score.predicted,
            "tier_saved_seconds_total": score.saved,
            "tier_regretted_seconds_total": score.regretted,
        }

    def has_host(self) -> bool:
        """Whether there is a host to offer pages to. With another one, all pages are as if never offered."""
        if self._tier is None:
            return False
        if self._host != (host := self._tier.host()):
            self._host = host
            self._offered.clear()
            self._unsaved.clear()
        return host != 0

    def is_offered(self, page: int) -> bool:
        """Whether the host that is there was offered what an indexed page holds."""
        return page in self._offered

    def note(self, key: bytes, parent: bytes, page: int) -> None:
        """A page is full, computed and indexed; one that nobody is there to take is not offered."""
        if not self.has_host():
            return
        self._offered.add(page)
        self._unsaved[page] = Save(key, parent, page)
        self._unsaved.move_to_end(page)
        if len(self._unsaved) > MAX_UNSAVED:
            self._unsaved.popitem(last=False)

    def observe(self, positions: NDArray[np.int64], seconds: float) -> None:
        """What an iteration over tokens at these positions of their sequences took."""
        if self._tier is not None and len(positions) >= LEAST_TOKENS:
            self.prefill.observe(len(positions), int(positions.sum()) + len(positions), seconds)

    def preempted(self, pages: list[int]) -> None:
        """A sequence loses its pages. Those that are cheaper to copy and load than to compute are copied next; the
        others are not copied for its sake."""
        if self._tier is None:
            return
        unsaved = [page for page in pages if page in self._unsaved]
        worth = self._tier.page_seconds() < self.prefill.seconds(0, self._page_tokens)
        for page in reversed(unsaved):
            if worth:
                self._unsaved.move_to_end(page, last=False)
            else:
                del self._unsaved[page]
                self._offered.discard(page)

    def send(self) -> None:
        """Hands as many pages to the tier as it takes now."""
        if self._tier is None or not self._unsaved or not self.has_host():
            self._starved_since = None
            return
        may_hold = max(LEAST_SAVING, self._pool.num_pages // SAVING_SHARE)
        room = min(self._tier.room(), may_hold - len(self._saving))
        if room > 0 or self._saving or self._loading:
            self._starved_since = None
        elif self._starved_since is None:
            self._starved_since = self._clock()
        looks = max(room, LEAST_LOOKS)
        chosen: list[Save] = []
        while len(chosen) < room and looks > 0 and self._unsaved:
            page, save = next(iter(self._unsaved.items()))
            if page in self._saving:  # for a host that is gone: its answer comes first
                break
            del self._unsaved[page]
            looks -= 1
            # The page may hold something else by now.
            if self._pool.index.key_of(page) == save.key and not self._tier.may_have(save.key):
                chosen.append(save)
        if chosen:
            pages = [save.page for save in chosen]
            self._pool.share(pages)
            self._saving.update(pages)
            self._tier.save(chosen)

    def load(self, sequence: Sequence, first: int, keys: list[bytes]) -> bool:
        """Begins to load pages of a sequence, `keys[first:]`; False if the tier is not likely to have any of them.

        The sequence has pages for all its tokens, and leaves them alone until `settle` gives it back.
        """
        if self._tier is None or first >= len(keys):
            return False
        total, page_tokens, prefill = len(sequence.tokens), self._page_tokens, self.prefill

        def recompute_seconds(count: int) -> float:
            done = (first + count) * page_tokens
            return prefill.seconds(done, total - done)

        # What is on this node is seen from here; what other nodes have, the host must ask.
        least = ASK_MOVED_S if sequence.request.given else ASK_S
        if not self._tier.may_have(keys[first]) and not (self.has_host() and recompute_seconds(0) >= least):
            return False
        pages = sequence.pages[first : len(keys)]
        self._loading[sequence.sequence_id] = _Loading(sequence, pages, self._tier.host())
        if not prefill.known:
            self._unscored.add(sequence.sequence_id)
        self._tier.load(Load(sequence.sequence_id, keys[first:], pages, recompute_seconds))
        return True

    def give_up(self, sequence: Sequence) -> None:
        """Pages of it that are on their way are not waited for: its load ends soon, with those that have come."""
        assert self._tier is not None
        self._unscored.add(sequence.sequence_id)
        self._tier.give_up(sequence.sequence_id)

    def gives_back(self, beneficiary: Sequence) -> bool:
        """Whether pages come back when what is on its way ends, that `beneficiary` may take.

        A load is as long as the tier is slow, and holds the pages that it loads into: one of a later sequence is given
        up, so that no sequence waits for another one's pages. What has come of it stays findable.
        """
        loading = [load.sequence for load in self._loading.values()]
        later = last_after(loading, beneficiary)
        if later is not None:
            self.give_up(later)
        over = any(sequence.status is Status.FINISHED for sequence in loading)
        return over or later is not None or any(self._pool.num_holders(page) == 1 for page in self._saving)

    def settle(self, timeout_s: float = 0.0) -> list[tuple[Sequence, int]]:
        """Sequences whose loads have ended, with the pages that each got; waits up to `timeout_s` for an answer."""
        if self._tier is None:
            return []
        settled: list[tuple[Sequence, int]] = []
        saved: list[int] = []
        for answer in self._tier.poll(timeout_s):
            match answer:
                case Saved(page, stored):
                    self._saving.remove(page)
                    saved.append(page)
                    if not stored:
                        self._offer_again()
                case Loaded(ticket, num_pages):
                    if ticket in self._unscored:
                        self._unscored.remove(ticket)
                    else:
                        self.score.add(answer)
                    settled.append((self._arrived(ticket, num_pages), num_pages))
        self._pool.release(saved)
        return settled

    def close(self) -> None:
        if self._tier is not None:
            self._tier.close()

    def _is_starved(self) -> bool:
        return self._starved_since is not None and self._clock() - self._starved_since >= STARVED_S

    def _offer_again(self) -> None:
        """A page was not kept, and nobody would find what comes after it: all is offered again, in order."""
        now = self._clock()
        if now >= self._offer_again_at:
            self._offer_again_at = now + OFFER_AGAIN_S
            self._offered.clear()

    def _arrived(self, ticket: int, num_pages: int) -> Sequence:
        """The sequence of a load that has ended. Its pages need no offer, if they came from the host that is there."""
        loading = self._loading.pop(ticket)
        if self.has_host() and loading.host == self._host:
            self._offered.update(loading.pages[:num_pages])
        return loading.sequence


class _Loading(NamedTuple):
    """A load that has not ended."""

    sequence: Sequence
    pages: list[int]
    host: int
    """Where they come from, as `Tier.host` numbers it."""


class Score:
    """How well loads were decided on, in seconds. Only ever grows."""

    def __init__(self) -> None:
        self.predicted = 0.0
        """That loads were expected to take."""
        self.actual = 0.0
        """That they took."""
        self.saved = 0.0
        """By which computing the same tokens was expected to take longer than loading them took."""
        self.regretted = 0.0
        """By which it was expected to take less."""

    def add(self, loaded: Loaded) -> None:
        self.predicted += loaded.predicted_seconds
        self.actual += loaded.seconds
        gain = loaded.recompute_seconds - loaded.seconds
        self.saved += max(0.0, gain)
        self.regretted += max(0.0, -gain)
