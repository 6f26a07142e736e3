"""Work that outlives the call that began it. Knows nothing of what is done."""

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """Keeps the tasks that it begins until they are done: an event loop alone may lose them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        # In a context of its own: Serve cancels the calls that were made in the context of an HTTP request when that
        # request ends, and a link to a replica serves many.
        task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def call(self, call: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Awaits a call that goes on by itself when its caller is cancelled."""

        async def bounded() -> T:
            async with asyncio.timeout(timeout_s):
                return await call

        return await asyncio.shield(self.spawn(bounded()))
