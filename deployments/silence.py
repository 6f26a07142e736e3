"""When the link to a replica is broken, and what that means for the requests that run there."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from ray.exceptions import RayActorError

from deployments.backend import Loss
from deployments.router import ReplicaGone

T = TypeVar("T")

TICK_S = 0.5
SILENT_TICKS = 8
"""A link without a frame for so many ticks of this gateway's own loop is broken: a living replica sends one every
second. Ticks and not seconds, because a gateway that was busy for a while has not listened either."""


async def heard(coming: Awaitable[T]) -> T:
    """What is awaited. Raises TimeoutError after SILENT_TICKS of this loop without it."""
    task = asyncio.ensure_future(coming)
    try:
        for _ in range(SILENT_TICKS):
            done, _ = await asyncio.wait({task}, timeout=TICK_S)
            if done:
                return task.result()
        raise TimeoutError
    finally:
        task.cancel()


def meaning(error: Exception, replica_id: str) -> tuple[str, Loss]:
    """What to say of a replica whose frames ended with an error, and of its requests."""
    match error:
        case ReplicaGone():
            return f"replica {replica_id} is gone", Loss.GONE
        case RayActorError():
            return f"replica {replica_id} died", Loss.FAILED
        case TimeoutError():
            return f"replica {replica_id} sent nothing for {SILENT_TICKS * TICK_S:.0f} s", Loss.SILENT
    return f"the stream of replica {replica_id} broke: {error}", Loss.GONE
