"""One rank of a model that several share: joins the others, loads its part, and runs the batches that all of them run.

A process has one rank. Whoever drives it knows the other ranks, gives every one the same batches in the same order, and
ends all of them when one is lost.
"""

import logging
import time
from functools import partial
from pathlib import Path

import torch

from engine.batch import Batch, StepOutput
from engine.config import EngineConfig
from engine.devices import choose_device
from engine.forward import Forward
from engine.kv.tier import PageMemory
from engine.models.directory import load_eos_token_ids
from engine.models.source import resolve_model
from engine.needs import needed_features
from engine.parallel.group import Link, TensorGroup
from engine.parallel.meeting import LOADING_TIMEOUT, Meeting
from engine.parallel.place import Place, RankFacts
from engine.parallel.sampler import RanksSampler
from engine.ready import load
from engine.runner import Draws, Receive, Runner, inputs_of, layout_of

__all__ = ["LoadedRank", "Place", "RankFacts", "RankRunner", "load_rank"]

log = logging.getLogger(__name__)

_BATCHES_UNDER_WAY = 4
"""To the next stage, that it has not taken yet; a group keeps about as many in flight as there are stages."""


class RankRunner:
    """Runs this rank's part of batches. One thread owns it."""

    def __init__(
        self,
        forward: Forward,
        page_tokens: int,
        memory: PageMemory,
        *,
        answers: bool,
        group: TensorGroup | None,
        receive: Receive | None,
        behind: Link | None,
        draws: Draws,
    ) -> None:
        """`receive` brings what the stage before makes, `behind` is the stage that goes on; None: there is none."""
        self.memory = memory
        """The pages of this rank."""
        self.waited_s = 0.0
        """Seconds, in all, for which this stage has waited in `run` for what the one before makes."""
        self._forward = forward
        self._page_tokens = page_tokens
        self._answers = answers
        self._group = group
        self._receive = None if receive is None else partial(self._wait_for, receive)
        self._behind = behind
        self._last = Runner(forward, page_tokens, draws, self._receive)

    def run(self, batch: Batch) -> StepOutput | None:
        """Returns what was drawn on the rank that answers. Raises RanksLost; the runner is of no use then."""
        if self._behind is not None:
            self._hand_on(batch, self._behind)
            return None
        output = self._last.run(batch)
        self._check()
        return output if self._answers else None

    def close(self) -> None:
        """Forgets the others. Batches that they still expect are not sent."""
        self._behind = self._receive = None

    def _hand_on(self, batch: Batch, behind: Link) -> None:
        layout = layout_of(batch, self._page_tokens, self._forward.device)
        hidden = self._forward.hidden(inputs_of(batch, self._forward.device, self._receive), layout)
        self._check()
        behind.send(hidden)
        # The batch's pages are copied and given away once its tokens are drawn, and no earlier.
        self._forward.wait()

    def _wait_for(self, receive: Receive, tokens: int) -> torch.Tensor:
        began = time.perf_counter()
        hidden = receive(tokens)
        self.waited_s += time.perf_counter() - began
        return hidden

    def _check(self) -> None:
        if self._group is not None:
            self._group.check()


class LoadedRank:
    """A rank that holds its weights and has room for pages, but no pages yet."""

    def __init__(self, config: EngineConfig, path: Path, meeting: Meeting) -> None:
        self._meeting = meeting
        self._place = meeting.place
        self._device = choose_device(config, needed_features(config, path, is_rank=True), meeting.share)
        self._torch_device = torch.device(self._device.name)
        self._group = self._join()
        self._ready = load(config, path, self._device, self._place, self._group)
        self._link = self._connect_stages()
        # Whoever still loads takes memory that looks free now.
        meeting.wait_for_all("loaded", LOADING_TIMEOUT)
        spec = self._ready.decoder.spec
        self.facts = RankFacts(
            num_pages=self._affordable_pages(config),
            page_tokens=self._device.page_tokens,
            page_bytes=self._ready.page_bytes,
            weight_bytes=self._ready.weight_bytes,
            max_position=spec.max_position,
            vocab_size=spec.vocab_size,
            eos_token_ids=load_eos_token_ids(path),
            namespace=self._ready.namespace,
        )

    @property
    def kernels(self) -> str:
        """For the log."""
        return self._ready.backend.name

    @property
    def sums_in_shared_memory(self) -> bool:
        """Whether what tensor ranks add up goes through memory that they share."""
        return self._group is not None and self._group.is_shared

    def start(self, num_pages: int) -> RankRunner:
        """Allocates keys and values and makes everything ready to run, on the thread that will run the batches.

        All ranks get the same number of pages.
        """
        decoder, device = self._ready.decoder, self._device
        cache = self._ready.cache(num_pages)
        forward = self._ready.backend.forward(decoder, cache)
        sampler = device.sampler()
        draws: Draws = sampler
        if self._group is not None and self._place.is_last:
            draws = RanksSampler(sampler, self._group, decoder.part.vocabulary, decoder.spec.vocab_size)
        return RankRunner(
            forward,
            device.page_tokens,
            self._ready.memory(cache),
            answers=self._place.answers,
            group=self._group,
            receive=None if self._place.is_first else self._receive,
            behind=None if self._place.is_last else self._link,
            draws=draws,
        )

    def _receive(self, tokens: int) -> torch.Tensor:
        assert self._link is not None
        return self._link.receive(tokens, self._torch_device)

    def _join(self) -> TensorGroup | None:
        place = self._place
        if place.tensor.size == 1:
            return None
        name = f"stage/{place.stage}"
        connections = self._meeting.connect(name, place.tensor.rank, place.tensor.size, self._torch_device)
        return TensorGroup(self._meeting, connections)

    def _connect_stages(self) -> Link | None:
        place, decoder = self._place, self._ready.decoder
        if place.stages == 1:
            return None
        connections = self._meeting.connect("stages", place.rank, place.world, self._torch_device)
        size, width = place.tensor.size, decoder.spec.hidden
        return Link(connections, place.rank, size, width, decoder.dtype, _BATCHES_UNDER_WAY)

    def _affordable_pages(self, config: EngineConfig) -> int:
        """Raises ValueError, naming the setting to change, if there is room for none."""
        place, page_bytes = self._place, self._ready.page_bytes
        if config.kv.memory == "auto":
            budget = int(self._device.free_bytes() * config.kv.memory_share)
        else:
            layers = self._ready.decoder.part.whole.layers
            replica_bytes = place.tensor.size * layers * page_bytes // len(place.layers)
            budget = config.kv.memory * page_bytes // replica_bytes
        if budget < page_bytes:
            raise ValueError(
                f"rank {place.rank} has {budget} bytes for keys and values, less than one page of "
                f"{self._device.page_tokens} tokens ({page_bytes} bytes): give kv.memory more"
            )
        return budget // page_bytes


def load_rank(config: EngineConfig, place: Place, rendezvous: str) -> LoadedRank:
    """Joins the others at `rendezvous` ("tcp://HOST:PORT" of a store that rank 0 opens), and reads this rank's part.

    Every rank of the replica calls it; it returns when all have read theirs. Threads that are left to "auto" are this
    rank's share of the cores. Raises ModelError or ValueError with the reason, RanksLost if the others do not come.
    """
    began = time.monotonic()
    path = resolve_model(config.model, config.revision)
    meeting = Meeting(place, rendezvous)
    loaded = LoadedRank(config, path, meeting)
    log.info(
        "%s from %s, rank %d of %d: layers %d to %d, tensor rank %d of %d%s, %s kernels, %d threads, weights %.1f MiB; "
        "%.1f s",
        config.model,
        path,
        place.rank,
        place.world,
        place.layers.start,
        place.layers.stop - 1,
        place.tensor.rank,
        place.tensor.size,
        " in shared memory" if loaded.sums_in_shared_memory else "",
        loaded.kernels,
        torch.get_num_threads(),
        loaded.facts.weight_bytes / 2**20,
        time.monotonic() - began,
    )
    return loaded
