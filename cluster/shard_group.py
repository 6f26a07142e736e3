"""All ranks of one replica as an executor: it starts them, hands every batch to each, and ends them together.

Owns the actors, the place that is reserved for them and the channel to them. One rank that is lost loses the group:
the others hold parts of a model that cannot compute any more. What is decided (who is lost, what fits) is decided
elsewhere; here is what is done about it.
"""

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import get_current_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ParallelConfig
from cluster.kv.wire import WireError
from cluster.nodes import living_nodes, this_node
from cluster.shard import RankLoader, ShardActor, Whereabouts, end_of, is_victim, reason_of
from cluster.shards.channel import ChannelClosed, GroupChannel
from cluster.shards.placement import Amounts, Bundles, NoRoom, bundle_of, lay_bundles, refusal
from cluster.shards.tier import GroupTier
from cluster.shards.watch import BEAT_S, LOADING_SILENCE_S, Loss, Watch
from cluster.shards.wire import without_edits
from engine.batch import Batch, StepOutput
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.kv.tier import TierFactory
from engine.parallel.place import Place, RankFacts

logger = logging.getLogger(__name__)

NAMESPACE = "manta"
PLACEMENT_TIMEOUT_S = 6.0
"""For a place to be free, and reserved: whoever was there may have just left."""
STARTING_S = 600.0
"""For the process of a rank to be there: Ray may have to bring what it imports to its node first."""


class ShardLost(Exception):
    """A rank is lost, and with it the whole group: names the rank, its node and the reason."""

    def __init__(self, rank: int, node: str, reason: str, others: str = "") -> None:
        super().__init__(rank, node, reason, others)
        self.rank = rank
        self.node = node
        self.reason = reason
        self.others = others

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node} is lost: {self.reason}" + (f" ({self.others})" if self.others else "")


def _do_nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class GroupOrder:
    """What a group is to be."""

    name: str
    """Of the replica; no other group that lives has it."""
    config: EngineConfig
    """Of each rank."""
    parallel: ParallelConfig
    places: tuple[Place, ...]
    """By rank."""
    load: RankLoader
    """Importable where the ranks run."""
    each: Amounts = field(default_factory=lambda: {"CPU": 1.0})
    """Resources of a rank, as Ray counts them."""
    prepare: Callable[[], None] = _do_nothing
    """The first that each rank does in its process."""
    make_tier: TierFactory | None = None
    """Where each rank's pages overflow to; None for nowhere. Importable there, too."""
    loading_silence_s: float = LOADING_SILENCE_S
    """After which a rank that says nothing is lost while it loads and gets ready."""
    starting_s: float = STARTING_S
    """After which a rank is lost that has never said anything."""

    @property
    def depth(self) -> int:
        """Batches in flight."""
        return self.parallel.pipeline if self.parallel.depth == "auto" else self.parallel.depth


class ShardGroup:
    """See `engine.executor.Executor`. One thread owns a group; any may ask for `failure`."""

    def __init__(self, order: GroupOrder) -> None:
        """Starts all ranks, which load their parts. Raises NoRoom, ShardLost, or what the first rank that failed raised
        if that is a ModelError or ValueError; nothing is left running then."""
        self.depth = order.depth
        self._order = order
        self._own_place: Any = None
        self._actors: list[Any] = []
        self._where: list[Whereabouts] = []
        self._processes: list[int] = []
        """File descriptors of those of this node (pidfd_open(2)): unlike a process id, each stays what it is."""
        self._channel: GroupChannel | None = None
        self._serving: list[Any] = []
        self._uncollected: deque[tuple[int, dict[int, str]]] = deque()
        """Steps in flight, with the rows that fail whatever is drawn for them."""
        self.tier: GroupTier | None = None
        """Where pages of the whole group overflow to, once it has started; for the thread that owns it."""
        self._ending = threading.Lock()
        self._ended = False
        try:
            self._actors = self._start_actors()
            self._where = self._ask_all([actor.whereabouts.remote() for actor in self._actors], order.starting_s)
            self._processes = self._open_processes()
            self._channel = channel = self._open_channel()
            channel.expect(order.loading_silence_s)
            first = self._where[0]
            host = f"[{first.address}]" if ":" in first.address else first.address
            self.facts: list[RankFacts] = self._ask_all(
                [
                    actor.load.remote(order.load, order.config, place, f"tcp://{host}:{first.port}", door)
                    for actor, place, door in zip(self._actors, order.places, channel.doors, strict=True)
                ]
            )
        except BaseException:
            self.close()
            raise

    def start(self, num_pages: int) -> None:
        """Has every rank make so many pages, and from then on watches them closely. Raises as the constructor does."""
        assert self._channel is not None
        try:
            self._ask_all([actor.start.remote(num_pages, self._order.make_tier) for actor in self._actors])
            for rank, actor in enumerate(self._actors):
                self._serving.append(actor.serve.remote())
                # Ray tells of the end of a process sooner than its silence does.
                self._serving[-1].future().add_done_callback(partial(self._stopped_serving, rank))
            self._channel.arm()
            if self._order.make_tier is not None:
                self.tier = GroupTier(self._channel.pages)
        except ChannelClosed:
            self.close()
            raise self._lost() from None
        except BaseException:
            self.close()
            raise

    @property
    def failure(self) -> ShardLost | None:
        """Why nothing can be computed any more, if so."""
        channel = self._channel
        return None if channel is None or channel.loss is None else self._blame(channel.loss)

    @property
    def where(self) -> tuple[Whereabouts, ...]:
        """By rank, the process that it is."""
        return tuple(self._where)

    @property
    def waited_s(self) -> tuple[float, ...]:
        """By rank, for how many seconds in all it had nothing to run, as of its latest beat: for want of a batch, or of
        what the stage before makes of one. While there is work for all of them, these are the pipeline's bubbles."""
        assert self._channel is not None
        return self._channel.waited_s

    def submit(self, batch: Batch) -> None:
        """Raises ShardLost. Rows whose edits are too large to send fail, and the rest of the batch is run."""
        assert self._channel is not None
        assert len(self._uncollected) < self.depth, "submit() without collect()"
        failed: dict[int, str] = {}
        try:
            try:
                self._channel.send(batch)
            except WireError as error:
                self._channel.send(without_edits(batch))
                failed = dict.fromkeys(batch.samples.edits, f"what is asked of its logits cannot be sent: {error}")
        except ChannelClosed:
            raise self._lost() from None
        self._uncollected.append((batch.step, failed))

    def collect(self) -> StepOutput:
        """Raises ShardLost, in less than 2 s from when a rank has died or was stopped."""
        assert self._channel is not None
        try:
            output = self._channel.receive()
        except ChannelClosed:
            raise self._lost() from None
        expected, failed = self._uncollected.popleft()
        if not isinstance(output, StepOutput) or output.step != expected:
            raise WireError(f"step {expected} was to come back, and {output!r:.60} did")
        return replace(output, failed={**output.failed, **failed}) if failed else output

    def close(self) -> None:
        """Ends all ranks, and gives back all that was reserved and opened for them."""
        self._end_ranks()
        if self._channel is not None:
            self._channel.close()
        for process in self._processes:
            os.close(process)
        self._processes = []

    # -- the start -----------------------------------------------------------------------------------------------------

    def _start_actors(self) -> list[Any]:
        order = self._order
        place = get_current_placement_group() or self._reserve()
        ranks, bundles = len(order.places), place.bundle_count
        each = dict(order.each)
        options = {"num_cpus": each.pop("CPU", 0.0), "num_gpus": each.pop("GPU", 0.0), "resources": each}
        return [
            ray.remote(ShardActor)
            .options(
                name=f"manta:{order.name}:rank {rank}",
                namespace=NAMESPACE,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    place, placement_group_bundle_index=bundle_of(rank, ranks, bundles)
                ),
                **options,
            )
            .remote(order.prepare)
            for rank in range(ranks)
        ]

    def _reserve(self) -> Any:
        """A place of our own, for a group that is not in a replica's. Raises NoRoom."""
        order = self._order
        lay_bundles(order.parallel, order.each, living_nodes(free=False), totals=True)
        laid = self._laid_within(PLACEMENT_TIMEOUT_S / 2)
        self._own_place = placement_group(
            list(laid.resources),
            strategy=laid.strategy,
            bundle_label_selector=list(laid.labels) if any(laid.labels) else None,
        )
        if not self._own_place.wait(PLACEMENT_TIMEOUT_S):
            raise NoRoom(refusal(order.parallel, order.each, living_nodes(free=True)))
        return self._own_place

    def _laid_within(self, seconds: float) -> Bundles:
        """Bundles that fit what is free. Ray counts what somebody has given back a moment later."""
        order, deadline = self._order, time.monotonic() + seconds
        while True:
            try:
                return lay_bundles(order.parallel, order.each, living_nodes(free=True))
            except NoRoom:
                if time.monotonic() > deadline:
                    raise
            time.sleep(BEAT_S)

    def _open_processes(self) -> list[int]:
        here = this_node()["NodeID"]
        found = []
        for each in self._where:
            if each.node == here:
                with contextlib.suppress(OSError):  # a process of another container
                    found.append(os.pidfd_open(each.pid))
        return found

    def _open_channel(self) -> GroupChannel:
        node = this_node()
        answering = next(place.rank for place in self._order.places if place.answers)
        return GroupChannel(
            [each.node == node["NodeID"] for each in self._where],
            answering,
            node["NodeManagerAddress"],
            Path(node["RayletSocketName"]).parent,
            self._on_loss,
        )

    def _ask_all(self, calls: Sequence[Any], seconds: float = math.inf) -> list[Any]:
        """What each rank answers. Raises the error of the one that is the cause, as soon as that is clear; a rank that
        takes longer than so many seconds is lost."""
        watch, deadline = Watch(len(calls)), time.monotonic() + seconds
        answers: dict[int, Any] = {}
        errors: dict[int, Exception] = {}
        pending = {call: rank for rank, call in enumerate(calls)}
        while pending or errors:
            if not pending:
                time.sleep(BEAT_S / 10)
            for call in ray.wait(list(pending), timeout=BEAT_S)[0] if pending else ():
                rank = pending.pop(call)
                try:
                    answers[rank] = ray.get(call)
                except ray.exceptions.RayActorError as error:
                    errors[rank] = error
                    watch.gone(rank, end_of(error))
                except ray.exceptions.RayTaskError as error:
                    errors[rank] = error.cause if isinstance(error.cause, Exception) else error
                    watch.fault(rank, reason_of(errors[rank]), is_victim=is_victim(errors[rank]))
            if time.monotonic() > deadline:
                for rank in pending.values():
                    watch.gone(rank, f"it has not started in {seconds:g} s")
            # First: all others have been ended since, and what they answer is that.
            if (failure := self.failure) is not None:
                raise failure
            if (loss := watch.verdict()) is not None:
                cause = errors.get(loss.rank)
                raise cause if isinstance(cause, ModelError | ValueError) else self._blame(loss)
        return [answers[rank] for rank in range(len(calls))]

    # -- the end -------------------------------------------------------------------------------------------------------

    def _stopped_serving(self, rank: int, future: Any) -> None:
        """Serving ends with the process alone; on a thread of Ray's."""
        if self._channel is not None and not self._ended:
            self._channel.gone(rank, "its process has ended")

    def _on_loss(self, loss: Loss) -> None:
        """On the channel's thread: whoever owns the group may not ask for anything for hours."""
        if self._ended:  # they are lost because we have ended them
            return
        logger.error("%s; the whole group ends", self._blame(loss))
        self._end_ranks()

    def _end_ranks(self) -> None:
        """Ends all processes, whatever they do, and gives their place back. Any thread; the second time for nothing."""
        with self._ending:
            if self._ended:
                return
            self._ended = True
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            # Without Ray its actors end by themselves; asked for anything, it would start.
            if not ray.is_initialized():
                return
            for actor in self._actors:
                with contextlib.suppress(Exception):
                    ray.kill(actor, no_restart=True)
            if self._own_place is not None:
                with contextlib.suppress(Exception):
                    remove_placement_group(self._own_place)

    def _lost(self) -> ShardLost:
        return self.failure or ShardLost(-1, "no node", "the group was closed")

    def _blame(self, loss: Loss) -> ShardLost:
        others = "; ".join(f"then {self._name(rank)}: {why}" for rank, why in loss.others)
        return ShardLost(loss.rank, self._node(loss.rank), loss.reason, others)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._node(rank)}"

    def _node(self, rank: int) -> str:
        if not self._where:
            return "a node of Ray's choice"
        return f"{self._where[rank].address}, process {self._where[rank].pid}"
