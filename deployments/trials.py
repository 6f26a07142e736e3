"""Requests that replicas may not survive: who is suspected of it, how suspects are tried, and what convicts one.

Decides; sends nothing. That a replica failed is evidence against the requests that it had not brought a token of, but
weak evidence: those that shared it with the culprit go on together and fail together again, and replicas are killed for
reasons of their own. So who was there twice in a row is only suspected. Suspects are tried one at a time, and only
failures of replicas on which a request was the only suspect count against it. Nobody is tried for longer than a while,
lest all others wait for one long prompt; who needs longer gets twice the time whenever it has to be tried again.

A culprit may bring a token before each failure. So failures soon after a request's first token are counted over its
whole life, too: after some, it is tried for a while beyond that token, and there is a number that nobody survives. What
brings an answer on by many tokens each time, though replicas are killed around it, is never counted out: it ends by
itself. Replicas that fall silent count half: most are stopped by something else.
"""

import asyncio
import math
from collections.abc import Callable
from types import TracebackType

from deployments.backend import Loss, NotReady

SUSPECTED_AFTER = 2
"""Replicas that failed in a row before a request brought a token there."""
PROOFS = 2
"""Failures in a row with one suspect that convict it. One would do against a culprit, and each more costs a replica.

But where replicas are killed again and again, an innocent that waits for its first token for a quarter of the time is
hit by three failures in a row, one of them a proof, once in 64 times, and by four once in 256."""
REPEATED = 4
"""Failures in all that make a suspect of a request whatever it brought between them. Kills at random rarely hit one
stream more than twice."""
MOST_FAILURES = 8
"""Failures in all that end a request: one that brings a little before each is not to go on for ever."""
MUCH = 32
"""Iterations with tokens of the request's, after which the failure of a replica is not counted among those in all:
where a request fails a replica because of what it is, it fails the next one at the same token."""
TRIAL_S = 10.0
"""The first trial of a request: far longer than it takes to end a replica that ends at once."""
PROBATION_S = 1.0
"""How much longer a request that was lost repeatedly is tried, once it has brought a token. The others wait."""


class Suspicion:
    """What speaks against one request."""

    def __init__(self) -> None:
        self.num_failures = 0
        """Replicas that failed in a row before the request brought a token there."""
        self._num_in_all = 0
        self._num_silent = 0
        self._num_proofs = 0

    @property
    def is_repeated(self) -> bool:
        """Whether it was lost so often that a token clears it no more."""
        return self._num_in_all >= REPEATED

    @property
    def is_suspect(self) -> bool:
        return self.num_failures >= SUSPECTED_AFTER or self.is_repeated

    @property
    def is_convicted(self) -> bool:
        return self._num_proofs >= PROOFS or self._num_in_all >= MOST_FAILURES

    @property
    def verdict(self) -> str:
        """What it is convicted of."""
        if self.num_failures >= SUSPECTED_AFTER + PROOFS:
            return f"{self.num_failures} replicas in a row failed"
        return f"{self._num_in_all} replicas failed"

    def trial_s(self) -> float:
        """Seconds that the next trial may take."""
        return TRIAL_S * 2.0 ** max(0, self.num_failures - SUSPECTED_AFTER)

    def acquit(self) -> None:
        """It brought a token, or was handed over by a replica that is well."""
        self.num_failures = 0
        if not self.is_repeated:
            self._num_proofs = 0

    def lost(self, loss: Loss, *, alone: bool, brought: int = 0) -> None:
        """`alone`: there was a trial, it was not over, and no other suspect was running. `brought`: in how many
        iterations it had brought tokens there."""
        if loss in (Loss.MOVED, Loss.PAUSED):
            self.acquit()
        elif loss is Loss.SILENT:
            self._num_silent += 1
            if self._num_silent % 2 == 0:
                self.lost(Loss.FAILED, alone=alone, brought=brought)
        elif loss is Loss.FAILED:
            self._num_proofs += self.is_suspect and alone
            self._num_in_all += brought < MUCH
            self.num_failures += not brought


class Court:
    """Where the suspects of one gateway are tried."""

    def __init__(self) -> None:
        self.seat = asyncio.Lock()
        self.num_at_large = 0
        """Suspects whose time was over before they brought a token or were lost: they run on beside the next one."""


class Trial:
    """An attempt at a suspect: entered when it is its turn, over with its first token, its end or its time; a while
    after its first token, if it was lost repeatedly.

    For a request that is no suspect it is nothing, and ends nothing.
    """

    def __init__(self, court: Court, suspicion: Suspicion, wait_s: Callable[[], float] = lambda: math.inf) -> None:
        """`wait_s`: how long it may wait for its turn."""
        self.alone = False
        """Whether it is, or ended, on trial, and no other suspect has been running since it began."""
        self._court = court
        self._is_needed = suspicion.is_suspect
        self._is_repeated = suspicion.is_repeated
        self._seconds = suspicion.trial_s()
        self._wait_s = wait_s
        self._has_seat = self._is_at_large = False
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> "Trial":
        """Raises NotReady if its turn does not come in time."""
        if self._is_needed:
            try:
                async with asyncio.timeout(self._wait_s()):
                    await self._court.seat.acquire()
            except TimeoutError:
                raise NotReady("other suspects were tried all the time") from None
            self._has_seat = True
            self.alone = not self._court.num_at_large
        return self

    def begin(self) -> None:
        """Its time runs from now on: there is a replica that can take it."""
        if self._has_seat:
            self._set_timer(self._seconds, self._adjourn)

    def brought(self) -> None:
        """Its first token has come."""
        if self._is_repeated and self._has_seat:
            self._set_timer(PROBATION_S, self._pass)
        else:
            self._pass()

    def end(self) -> None:
        """The next suspect may be tried; again changes nothing."""
        self._set_timer(0.0, None)
        if self._is_at_large:
            self._is_at_large = False
            self._court.num_at_large -= 1
        self._leave_seat()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def _set_timer(self, seconds: float, then: Callable[[], None] | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if then is None else asyncio.get_running_loop().call_later(seconds, then)

    def _pass(self) -> None:
        self.alone = False
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
