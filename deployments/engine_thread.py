"""The thread that owns an engine. Everybody else talks to the engine through it; only this file touches the engine.

Knows neither asyncio nor Ray: results leave through a callback, which must be quick and safe to call from this thread.
"""

import gc
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from deployments.liveness import Pulse
from engine.errors import InvalidRequest
from engine.sequence import Emission, FinishReason, Request
from engine.stats import EngineStats

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0


class EngineStopped(Exception):
    """The engine takes no more requests: it was closed, or an iteration failed."""


class EngineLike(Protocol):
    """What the thread drives: `engine.engine.Engine`, or a fake in the tests."""

    def add(self, request: Request) -> None:
        """Queues a request; raises InvalidRequest."""

    def abort(self, request_id: str) -> None:
        """Ends a request; an unknown or finished one is ignored."""

    def step(self) -> list[Emission]:
        """Runs one iteration."""

    def has_work(self) -> bool:
        """Whether `step` would do anything."""

    @property
    def step_tokens(self) -> int:
        """Tokens that the running iteration runs, or the latest one ran; 0 if it runs none. Any thread may ask, unlike
        for anything else."""

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


E = TypeVar("E", bound=EngineLike)
Deliver = Callable[[Sequence[Emission], EngineStats], None]


@dataclass(frozen=True, slots=True)
class _Add:
    request: Request
    done: Future[None]


@dataclass(frozen=True, slots=True)
class _Abort:
    request_ids: tuple[str, ...]


class EngineThread(Generic[E]):
    """Builds an engine in its own thread and steps it while there is work; sleeps, without polling, when there is none.

    `deliver` is called on that thread, once per iteration and once after commands that changed the engine's state
    without an iteration. If an iteration raises, every unfinished stream gets a MOVED emission, the traceback is
    logged once, and from then on `failure` says why and every `add` is refused.
    """

    def __init__(self, build: Callable[[], E], deliver: Deliver) -> None:
        self._build = build
        self._deliver = deliver
        self._started: Future[E] = Future()
        self._changed = threading.Condition()
        self._commands: deque[_Add | _Abort] = deque()
        self._taken: deque[_Add | _Abort] = deque()
        self._closing = False
        self._failure: Exception | None = None
        self._open_samples: dict[str, set[int]] = {}
        self._pulse = Pulse()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> Future[E]:
        """Starts the thread. The future has the engine once it is built, or the reason why it cannot be."""
        self._thread.start()
        return self._started

    @property
    def failure(self) -> Exception | None:
        """The exception that ended the engine, if one did."""
        return self._failure

    def stuck_for(self) -> float | None:
        """Seconds that the running iteration has taken, if that is far longer than usual; None if all is well."""
        return self._pulse.stuck_for()

    def add(self, request: Request) -> Future[None]:
        """Resolves once the engine has queued the request, at the latest after the running iteration.

        Fails with InvalidRequest, with EngineStopped if there is no engine any more, and with RuntimeError if it was
        this request that made it fail.
        """
        done: Future[None] = Future()
        self._command(_Add(request, done))
        return done

    def abort(self, request_ids: Sequence[str]) -> None:
        """Ends requests before the next iteration; their streams bring nothing more."""
        self._command(_Abort(tuple(request_ids)))

    def close(self) -> None:
        """Ends the thread after the running iteration and releases the engine."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_TIMEOUT_S)

    def _command(self, command: _Add | _Abort) -> None:
        with self._changed:
            if not self._closing and self._failure is None:
                self._commands.append(command)
                self._changed.notify()
                return
        _refuse(command)

    def _run(self) -> None:
        try:
            engine = self._build()
        except Exception as error:
            self._stop(error)
            self._started.set_exception(error)
            return
        # What was built stays for good. Later collections need not walk it, which takes longer than many iterations.
        gc.collect()
        gc.freeze()
        self._started.set_result(engine)
        try:
            stats = engine.stats()
            while self._take_commands(idle=not engine.has_work()):
                stats = self._iterate(engine) or stats
        except Exception as error:
            logger.exception("The engine failed; %d requests end with an error", len(self._open_samples))
            self._stop(error)
            self._deliver(self._last_words(error), stats)
        finally:
            self._stop(None)
            engine.close()

    def _take_commands(self, *, idle: bool) -> bool:
        """Takes the commands that wait, after waiting for one if the engine is idle; False when it is time to stop."""
        with self._changed:
            while idle and not self._commands and not self._closing:
                self._changed.wait()
            self._taken, self._commands = self._commands, self._taken
            return not self._closing

    def _iterate(self, engine: E) -> EngineStats | None:
        """Applies the commands and runs an iteration; returns what it delivered, or None if there was nothing to do."""
        commanded = bool(self._taken)
        while self._taken:
            self._apply(engine, self._taken.popleft())
        emissions = self._step(engine) if engine.has_work() else []
        if not emissions and not commanded and not engine.has_work():
            return None
        self._account(emissions)
        stats = engine.stats()
        self._deliver(emissions, stats)
        return stats

    def _step(self, engine: E) -> list[Emission]:
        self._pulse.began(lambda: engine.step_tokens)
        emissions = engine.step()
        self._pulse.finished()
        return emissions

    def _apply(self, engine: E, command: _Add | _Abort) -> None:
        match command:
            case _Add(request, done):
                if not done.set_running_or_notify_cancel():
                    return
                try:
                    engine.add(request)
                except InvalidRequest as error:
                    done.set_exception(error)
                except Exception:
                    # Not EngineStopped: sent to another replica, this request would end that one too.
                    done.set_exception(RuntimeError("the engine failed on this request"))
                    raise
                else:
                    self._open_samples[request.request_id] = set(request.open_samples)
                    done.set_result(None)
            case _Abort(request_ids):
                for request_id in request_ids:
                    if self._open_samples.pop(request_id, None) is not None:
                        engine.abort(request_id)

    def _account(self, emissions: Sequence[Emission]) -> None:
        for emission in emissions:
            if emission.finish_reason is None:
                continue
            samples = self._open_samples.get(emission.request_id)
            if samples is not None:
                samples.discard(emission.sample_index)
                if not samples:
                    del self._open_samples[emission.request_id]

    def _last_words(self, error: Exception) -> list[Emission]:
        return [
            Emission(request_id, sample, finish_reason=FinishReason.MOVED, error=f"the engine failed: {error}")
            for request_id, samples in self._open_samples.items()
            for sample in sorted(samples)
        ]

    def _stop(self, error: Exception | None) -> None:
        with self._changed:
            self._closing = True
            self._failure = self._failure or error
            refused = [*self._taken, *self._commands]
            self._taken.clear()
            self._commands.clear()
        for command in refused:
            _refuse(command)


def _refuse(command: _Add | _Abort) -> None:
    if isinstance(command, _Add) and command.done.set_running_or_notify_cancel():
        command.done.set_exception(EngineStopped("the engine has stopped"))
