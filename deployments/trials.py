"""Requests that replicas may not survive: who is suspected of it, how suspects are tried, and what convicts one.

Decides; sends nothing. That a replica failed is evidence against the requests that it had not brought a token of, but
weak evidence: those that shared it with the culprit go on together and fail together again, and replicas are killed for
reasons of their own. So who was there twice in a row is only suspected. Suspects are tried one at a time, and only
failures of replicas on which a request was the only suspect count against it. Nobody is tried for longer than a while,
lest all others wait for one long prompt; who needs longer gets twice the time whenever it has to be tried again.
"""

import asyncio
from types import TracebackType

from deployments.backend import Loss

SUSPECTED_AFTER = 2
"""Replicas that failed in a row before a request brought a token there."""
PROOFS = 2
"""Failures in a row with one suspect that convict it. One would do against a culprit, and each more costs a replica.

But where replicas are killed again and again, an innocent that waits for its first token for a quarter of the time is
hit by three failures in a row, one of them a proof, once in 64 times, and by four once in 256."""
TRIAL_S = 10.0
"""The first trial of a request: far longer than it takes to end a replica that ends at once."""


class Suspicion:
    """What speaks against one request."""

    def __init__(self) -> None:
        self.num_failures = 0
        """Replicas that failed in a row before the request brought a token there."""
        self._num_proofs = 0

    @property
    def is_suspect(self) -> bool:
        return self.num_failures >= SUSPECTED_AFTER

    @property
    def is_convicted(self) -> bool:
        return self._num_proofs >= PROOFS

    def trial_s(self) -> float:
        """Seconds that the next trial may take."""
        return TRIAL_S * 2.0 ** max(0, self.num_failures - SUSPECTED_AFTER)

    def acquit(self) -> None:
        """It brought a token, or was handed over by a replica that is well."""
        self.num_failures = self._num_proofs = 0

    def lost(self, loss: Loss, *, alone: bool) -> None:
        """It was lost before it brought a token. `alone`: there was a trial, and no other suspect was running."""
        if loss in (Loss.MOVED, Loss.PAUSED):
            self.acquit()
        elif loss is Loss.FAILED:
            self._num_proofs += self.is_suspect and alone
            self.num_failures += 1


class Court:
    """Where the suspects of one gateway are tried."""

    def __init__(self) -> None:
        self.seat = asyncio.Lock()
        self.num_at_large = 0
        """Suspects whose time was over before they brought a token or were lost: they run on beside the next one."""


class Trial:
    """An attempt at a suspect: entered when it is its turn, over with its first token, its end or its time.

    For a request that is no suspect it is nothing, and ends nothing.
    """

    def __init__(self, court: Court, suspicion: Suspicion) -> None:
        self.alone = False
        """Whether no other suspect has been running since it began."""
        self._court = court
        self._is_needed = suspicion.is_suspect
        self._seconds = suspicion.trial_s()
        self._has_seat = self._is_at_large = False
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> "Trial":
        if self._is_needed:
            await self._court.seat.acquire()
            self._has_seat = True
            self.alone = not self._court.num_at_large
        return self

    def begin(self) -> None:
        """Its time runs from now on: there is a replica that can take it."""
        if self._has_seat:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._adjourn)

    def end(self) -> None:
        """The next suspect may be tried; again changes nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_at_large:
            self._is_at_large = False
            self._court.num_at_large -= 1
        self._leave_seat()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def _adjourn(self) -> None:
        self.alone = False
        self._is_at_large = True
        self._court.num_at_large += 1
        self._leave_seat()

    def _leave_seat(self) -> None:
        if self._has_seat:
            self._has_seat = False
            self._court.seat.release()
