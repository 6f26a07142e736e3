"""One rank of a sharded model as Ray runs it: an actor that loads its part, then runs every batch that its group sends.

Owns the life of a rank: it says why it cannot go on before its neighbours notice, and ends itself when its group is
gone. Ray places it and starts it; batches do not come through Ray. Knows no model: `load` makes the runner.
"""

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

import ray

from cluster.kv.wire import WireError
from cluster.ports import hold_port
from cluster.shards.channel import RankChannel
from cluster.shards.door import Door
from cluster.shards.tier import RankTier
from engine.batch import Batch, StepOutput
from engine.config import EngineConfig
from engine.errors import RanksLost
from engine.kv.tier import PageMemory, TierFactory
from engine.parallel.place import Place, RankFacts

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"\bip=([^,\s)]+)")


class RankRunner(Protocol):
    """A rank that is ready: `engine.parallel.rank.RankRunner`, or a fake."""

    @property
    def memory(self) -> PageMemory:
        """This rank's pages."""

    @property
    def waited_s(self) -> float:
        """Seconds, in all, that `run` has waited for what the stage before makes."""

    def run(self, batch: Batch) -> StepOutput | None:
        """Runs a batch with all other ranks; the output, at the rank that answers."""

    def close(self) -> None: ...


class LoadedRank(Protocol):
    """A rank that holds its weights and no pages yet."""

    @property
    def facts(self) -> RankFacts: ...

    def start(self, num_pages: int) -> RankRunner: ...


RankLoader = Callable[[EngineConfig, Place, str], LoadedRank]
"""Joins the other ranks at "tcp://HOST:PORT", which rank 0 opens, and loads a part. Raises ModelError or ValueError."""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where the process of a rank runs."""

    node: str
    """Its id."""
    address: str
    """That Ray knows the node by."""
    pid: int
    port: int
    """Of that address, which is free, and kept so until the rank has loaded."""


class ShardActor:
    """Its methods are called once each, in this order; the last one returns only when the group is gone."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        """`prepare` is the first thing done in this process: its logging."""
        prepare()
        self._loaded: LoadedRank | None = None
        self._runner: RankRunner | None = None

    def whereabouts(self) -> Whereabouts:
        context = ray.get_runtime_context()
        address = ray.util.get_node_ip_address()
        # Until it is listened on: another group that starts now would be sent there, and its ranks meet these.
        self._held = hold_port(address)
        return Whereabouts(context.get_node_id(), address, os.getpid(), self._held.getsockname()[1])

    def load(self, load: RankLoader, config: EngineConfig, place: Place, rendezvous: str, door: Door) -> RankFacts:
        """Loads the part of `place`. Raises ConnectionError, and what `load` raises."""
        self._channel = RankChannel(door, lambda: _end(door))
        self._loaded = load(config, place, rendezvous)
        self._held.close()
        return self._loaded.facts

    def start(self, num_pages: int, make_tier: TierFactory | None) -> None:
        """Gets ready to run, with so many pages, which overflow to what `make_tier` makes. Raises what they raise."""
        assert self._loaded is not None, "load() comes before start()"
        self._runner = self._loaded.start(num_pages)
        if make_tier is not None:
            namespace = self._loaded.facts.namespace
            client = make_tier(namespace, self._runner.memory)
            fail = self._channel.fault
            self._tier = RankTier(self._channel.pages(), client, lambda error: fail(reason_of(error)))
        self._loaded = None

    def serve(self) -> NoReturn:
        """Runs batches until this process is ended."""
        assert self._runner is not None, "start() comes before serve()"
        try:
            serve(self._channel, self._runner)
        except Exception as error:
            logger.exception("A rank cannot go on")
            self._channel.fault(reason_of(error), is_victim=is_victim(error))
            # Neighbours that lost their connection to this rank now would blame it on that.
            threading.Event().wait()
            raise


def serve(channel: RankChannel, runner: RankRunner) -> NoReturn:
    """Runs what comes, in order. Raises what the runner raises, and WireError."""
    waited_s = 0.0
    while True:
        began = time.perf_counter()
        message = channel.receive()
        waited_s += time.perf_counter() - began
        if not isinstance(message, Batch):
            raise WireError(f"the group sent a {type(message).__name__}")
        output = runner.run(message)
        if output is not None:
            channel.send(output)
        # In this order: whoever reads how many are finished has the time up to the latest of them.
        channel.waited_s = waited_s + runner.waited_s
        channel.finished += 1


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def end_of(error: ray.exceptions.RayActorError) -> str:
    """Why the process of a rank is not there, as far as Ray tells."""
    if not error.actor_init_failed:
        return "its process has ended"
    # It tells in a text for a terminal: where it was, then a traceback, which the exception ends.
    text = str(error).rstrip()
    where = _ADDRESS.search(text)
    return f"it could not start{f' on {where[1]}' if where else ''}: {text.rpartition(chr(10))[2].strip()}"


def is_victim(error: BaseException) -> bool:
    """Whether it says that other ranks are lost."""
    return isinstance(error, RanksLost | ConnectionError)


def _end(door: Door) -> None:
    """Ends this process: nobody is left who wants it. It may hang in whatever its neighbours do not answer."""
    logger.warning("Rank %d hears nothing of its group: it ends", door.rank)
    if door.folder:
        shutil.rmtree(door.folder, ignore_errors=True)
    logging.shutdown()
    os._exit(1)
