"""A backend whose replicas are lost at chosen moments, and requests whose tokens are known."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from deployments.backend import ReplicaLost
from deployments.continuation import ContinuingBackend
from deployments.messages import ModelCard
from engine.sampling_params import SamplingParams
from engine.sequence import Emission, FinishReason, Request
from tests.deployments.fakes import FakeEngine, token_at


@dataclass
class Replicas:
    """A backend whose attempts end as they are told: after so many emissions, with an exception; then it works."""

    faults: list[tuple[int, Exception | FinishReason]] = field(default_factory=list)
    attempts: list[Request] = field(default_factory=list)

    async def generate(self, request: Request) -> AsyncGenerator[Emission, None]:
        self.attempts.append(request)
        left, fault = self.faults.pop(0) if self.faults else (-1, None)
        engine = FakeEngine(step_s=0)
        engine.add(request)
        while engine.has_work():
            for emission in engine.step():
                if left == 0:
                    if isinstance(fault, FinishReason):
                        yield Emission(request.request_id, emission.sample_index, finish_reason=fault)
                        return
                    assert fault is not None
                    raise fault
                left -= 1
                yield emission
                await asyncio.sleep(0)

    async def card(self) -> ModelCard:
        raise NotImplementedError

    async def ready(self) -> bool:
        return True

    async def metrics(self) -> bytes:
        return b""


def lost() -> ReplicaLost:
    return ReplicaLost("it was killed")


def make_request(n: int = 1, max_tokens: int = 6, **params: object) -> Request:
    return Request("r", (1, 2, 3), SamplingParams(n=n, max_tokens=max_tokens, **params))  # type: ignore[arg-type]


async def tokens_of(backend: ContinuingBackend, request: Request) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(request.params.n)]
    async for emission in backend.generate(request):
        found[emission.sample_index].extend(emission.token_ids)
    return found


def wanted(request: Request) -> list[list[int]]:
    count = request.params.max_tokens or 0
    return [[token_at(request, sample, index) for index in range(count)] for sample in range(request.params.n)]
