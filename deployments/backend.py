"""What the HTTP side asks of whatever makes tokens: replicas behind Ray, or a fake in the tests of the API."""

from collections.abc import AsyncGenerator
from enum import Enum
from typing import Protocol

from deployments.messages import ModelCard
from engine.sequence import Emission, Request


class NotReady(Exception):
    """No replica can take a request now: still loading, draining or gone."""


class GenerationFailed(Exception):
    """A request that was accepted cannot be finished; the message may be shown to the client."""


class ModelGone(GenerationFailed):
    """The model that a request was written for is served no more: another one is, which cannot go on with it."""


class Loss(Enum):
    """Why a replica does not go on with a request."""

    FAILED = "failed"
    """It failed while it had the request, which may be why."""
    GONE = "gone"
    """It is not there any more: no request did that."""
    SILENT = "silent"
    """It says nothing any more, be it because of the request or of something else."""
    MOVED = "moved"
    """It handed the request over; nothing went wrong."""
    PAUSED = "paused"
    """It need not wait for a client that does not read."""


class ReplicaLost(GenerationFailed):
    """The replica that served a request is gone, or gives it up; another one can go on from what has arrived."""

    def __init__(self, message: str, loss: Loss = Loss.FAILED) -> None:
        super().__init__(message)
        self.loss = loss


class Backend(Protocol):
    """Turns a request into emissions."""

    async def card(self) -> ModelCard:
        """The model that is served. Raises NotReady while no replica has loaded it."""

    async def ready(self) -> bool:
        """Whether a request sent now would be taken by a replica."""

    def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
        """Emissions of all samples of the request, each sample's in order, until every sample has a finish reason.

        Raises InvalidRequest, NotReady or GenerationFailed. Closing the generator early aborts the request.
        """

    async def metrics(self) -> bytes:
        """The Prometheus exposition of the application."""
