"""Sends what one process has measured to the metrics hub, about once a second while something happens.

Knows how often and how to survive a hub that is away; not what is measured, nor where the hub is.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable

from monitoring.recorder import Delta, Recorder

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
HEARTBEAT_S = 5.0
"""Longest silence: the hub drops the gauges of a process that it has not heard of for three times as long."""
MAX_UNSENT = 600
"""Deltas kept for a hub that does not answer; older ones are given up."""


class MetricsPusher:
    """Drains a recorder into the hub."""

    def __init__(self, recorder: Recorder, send: Callable[[Delta], Awaitable[None]]) -> None:
        self._recorder = recorder
        self._send = send
        self._unsent: deque[Delta] = deque(maxlen=MAX_UNSENT)
        self._gauges: object = None
        self._sending = asyncio.Lock()

    async def run(self) -> None:
        """Pushes until cancelled."""
        silent_for = HEARTBEAT_S
        while True:
            silent_for = 0.0 if await self.push(even_unchanged=silent_for >= HEARTBEAT_S) else silent_for + PERIOD_S
            await asyncio.sleep(PERIOD_S)

    async def push(self, *, even_unchanged: bool = False) -> bool:
        """Sends what is new, and what could not be sent before; returns whether there was anything."""
        delta = self._recorder.drain()
        if even_unchanged or not delta.empty or delta.gauges != self._gauges:
            self._gauges = delta.gauges
            self._unsent.append(delta)
        if not self._unsent:
            return False
        async with self._sending:
            while self._unsent:
                try:
                    await self._send(self._unsent[0])
                except Exception as error:
                    # The hub is being replaced, or the application is going down: the deltas wait.
                    logger.debug("Metrics were not delivered: %s", error)
                    break
                self._unsent.popleft()
        return True
