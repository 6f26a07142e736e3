"""The replicas' deployment in one process and without Ray: real replicas over fake engines, or any others, behind
what acts like a Serve handle. Calls go where `deployments.router_adapter` sends them."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import ActorUnavailableError

from deployments import replica as replica_module
from deployments.messages import Attach, Frame, Submit
from deployments.ray_backend import RayBackend
from deployments.replica import EngineFactory, LLMReplica
from deployments.router import Ledger, ReplicaGone
from engine.config import EngineConfig
from engine.limits import Limits, check_request
from engine.sampling_params import SamplingParams
from engine.sequence import Emission, Request
from tests.deployments.fakes import FakeEngine, token_at

WAIT_S = 30.0


class CheckedEngine(FakeEngine):
    """Refuses what the real one refuses, and remembers what it took."""

    def __init__(self, path: Path, max_model_len: int, step_s: float) -> None:
        super().__init__(step_s, path)
        self.max_model_len = max_model_len
        self.taken: list[Request] = []

    def add(self, request: Request) -> None:
        check_request(request, Limits(self.max_model_len, self.vocab_size))
        self.taken.append(request)
        super().add(request)


class Replica(LLMReplica):
    """Ended by `end`: nothing awaits the coroutine when Python collects it."""

    engine: CheckedEngine
    end = LLMReplica.__del__

    def __del__(self) -> None:
        pass


class Deployment:
    """The replicas, by name, and which of them Serve sends requests to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setattr(replica_module, "configure_logging", lambda name: None)
        self._monkeypatch = monkeypatch
        self._folder = folder
        self.replicas: dict[str, Replica] = {}
        self.faults: dict[str, Exception] = {}
        """What the frames of a replica end with."""
        self.deadly: list[str] = []
        """Replicas that a request ends on its way to them."""
        self.stalled: dict[str, asyncio.Event] = {}
        """What the frames of a replica get lost before; the replica goes on and knows nothing of it."""
        self.answers = asyncio.Event()
        """Whether the answers to submitted requests arrive now."""
        self.answers.set()
        self.open = asyncio.Event()
        """Whether requests are routed now."""
        self.open.set()
        self.changed = asyncio.Event()
        self._listed: list[str] = []
        self._ledger: Ledger | None = None

    async def start(
        self, name: str, model: str = "one", max_model_len: int = 1000, step_s: float = 0.002, **choices: Any
    ) -> Replica:
        """One more replica, later than those before. Each word for `model` is another model."""
        path = self._folder / model
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(model)
        engine = CheckedEngine(path, max_model_len, step_s)
        config = EngineConfig(model=str(path), device="cpu", **choices)
        started = await self.serve(name, config, lambda config, find_host: engine)
        started.engine = engine
        return started

    async def serve(self, name: str, config: EngineConfig, make_engine: EngineFactory) -> Replica:
        """One more replica, over any engine."""
        context = SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), app_name="app")
        self._monkeypatch.setattr(serve, "get_replica_context", lambda: context)
        started = Replica.__new__(Replica)
        await started.__init__(config, "fake", _Hub(), make_engine, None)  # type: ignore[misc]
        started._card = replace(started._card, created=1000 + len(self.replicas))
        self.replicas[name] = started
        self.list(*self._listed, name)
        return started

    def list(self, *names: str) -> None:
        """Serve sends requests to these from now on."""
        self._listed = [*names]
        if self._ledger is not None:
            self._ledger.update_list(names)
        self.changed.set()

    async def end(self) -> None:
        for each in self.replicas.values():
            await each.end()

    async def route(self, call: Submit) -> Replica:
        await self.open.wait()
        while not self._listed:
            self.changed.clear()
            await self.changed.wait()
        assert isinstance(call.outstanding, Ledger)
        self._ledger = call.outstanding
        self._ledger.update_list(self._listed)
        ranked = self._ledger.place(call.request.request_id, call.cost, self._listed, call.unfit)
        return self.replicas[ranked[0]]

    def named(self, name: str | None) -> Replica:
        if not self._listed:
            raise ReplicaGone("there is none")
        if name is not None and name not in self._listed:
            raise ReplicaGone(f"replica {name} is gone")
        return self.replicas[name or self._listed[0]]

    def options(self, method_name: str, stream: bool = False) -> "_Method":
        return _Method(self, method_name)


class _Hub:
    def options(self, method_name: str) -> "_Hub":
        return self

    async def remote(self, *args: Any) -> None:
        pass


class _Method:
    def __init__(self, deployment: Deployment, name: str) -> None:
        self._deployment = deployment
        self._name = name

    def remote(self, call: Any) -> Any:
        return _Frames(self._deployment, call) if self._name == "frames" else self._call(call)

    async def _call(self, call: Any) -> Any:
        if isinstance(call, Submit):
            chosen = await self._deployment.route(call)
            if chosen._replica_id in self._deployment.deadly:
                raise ActorUnavailableError("killed", None)
            answer = await chosen.submit(replace(call, outstanding={}))
            await self._deployment.answers.wait()
            return answer
        chosen = self._deployment.named(call.replica_id)
        return await getattr(chosen, self._name)(call)


class _Frames:
    """A stream of frames as a handle gives it."""

    def __init__(self, deployment: Deployment, call: Attach) -> None:
        self._deployment = deployment
        self._call = call
        self._frames: AsyncGenerator[Frame, None] | None = None

    async def __anext__(self) -> Frame:
        if self._frames is None:
            self._frames = self._deployment.named(self._call.replica_id).frames(self._call)
        frame = await anext(self._frames)
        if (over := self._deployment.stalled.get(self._call.replica_id)) is not None:
            await over.wait()
        if self._call.replica_id in self._deployment.faults:
            raise self._deployment.faults[self._call.replica_id]
        return frame

    def cancel(self) -> None:
        self._closing = asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        with suppress(RuntimeError, StopAsyncIteration):
            if self._frames is not None:
                over = self._deployment.stalled.get(self._call.replica_id)
                while over is not None and not over.is_set():
                    # The replica does not know yet that nobody reads.
                    await anext(self._frames)
                await self._frames.aclose()


class Setting:
    """A gateway's backend over a deployment."""

    def __init__(self, deployment: Deployment) -> None:
        async def metrics() -> bytes:
            return b""

        self.deployment = deployment
        self.backend = RayBackend("gateway", deployment, metrics)  # type: ignore[arg-type]

    async def request(self, max_tokens: int = 200, **params: Any) -> Request:
        """As the API writes it, for the model that is served."""
        card = await self.backend.card()
        return Request("r", (1, 2, 3), SamplingParams(max_tokens=max_tokens, **params), model=card.identity)

    def places(self, *names: str) -> list[int]:
        """How many requests each of these replicas has taken."""
        return [len(self.deployment.replicas[name].engine.taken) for name in names]


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, scenario: Callable[[Setting], Awaitable[None]]) -> None:
    """Runs a scenario and ends what it has started."""

    async def bounded() -> None:
        deployment = Deployment(monkeypatch, folder)
        try:
            async with asyncio.timeout(WAIT_S):
                await scenario(Setting(deployment))
        finally:
            await deployment.end()

    asyncio.run(bounded())


def expected(request: Request) -> list[int]:
    """The tokens of the request's first sample."""
    return [token_at(request, 0, index) for index in range(request.params.max_tokens or 0)]


def tokens(emissions: list[Emission]) -> list[int]:
    return [token for emission in emissions for token in emission.token_ids]


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)
