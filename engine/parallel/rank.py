"""One rank of a model that several share: joins the others, loads its part, and runs the batches that all of them run.

A process has one rank. Whoever drives it knows the other ranks, gives every one the same batches in the same order, and
ends all of them when one is lost.
"""

import logging
import time
from pathlib import Path

import torch

from engine.batch import Batch, StepOutput
from engine.choices import choose_kv_dtype, has_int4, load_configured, page_namespace
from engine.config import EngineConfig
from engine.devices import Device, choose_device
from engine.forward import Backend, Forward
from engine.kv.cache import PagedKVCache, kv_bytes_per_token
from engine.kv.copies import DevicePages, HostPages
from engine.kv.tier import PageMemory
from engine.machine import available_cores
from engine.models.decoder import Decoder
from engine.models.directory import load_eos_token_ids
from engine.models.loader import LoadedModel
from engine.models.source import resolve_model
from engine.models.spec import ModelSpec
from engine.parallel.group import Link, TensorGroup
from engine.parallel.meeting import LOADING_TIMEOUT, Meeting
from engine.parallel.place import Place, RankFacts
from engine.parallel.sampler import RanksSampler
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
        self._forward = forward
        self._page_tokens = page_tokens
        self._answers = answers
        self._group = group
        self._receive = receive
        self._behind = behind
        self._last = Runner(forward, page_tokens, draws, receive)

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

    def _check(self) -> None:
        if self._group is not None:
            self._group.check()


class LoadedRank:
    """A rank that holds its weights and has room for pages, but no pages yet."""

    def __init__(
        self,
        config: EngineConfig,
        path: Path,
        device: Device,
        loaded: LoadedModel,
        meeting: Meeting,
    ) -> None:
        self._device = device
        self._meeting = meeting
        self._torch_device = torch.device(device.name)
        self._place = meeting.place
        self._group = self._join()
        self._backend: Backend = device.backend(loaded, self._group)
        self._decoder = Decoder(loaded.part, loaded.parameters, self._backend.operators, loaded.dtype)
        self._kv_dtype = choose_kv_dtype(config, path, device.name, loaded.dtype)
        self._link = self._connect_stages()
        page_tokens, spec = device.page_tokens, loaded.part.spec
        page_bytes = page_tokens * kv_bytes_per_token(spec, self._kv_dtype)
        # Whoever still loads takes memory that looks free now.
        meeting.wait_for_all("loaded", LOADING_TIMEOUT)
        namespace = page_namespace(
            config,
            path,
            self._kv_dtype,
            self._backend.kv_layout,
            page_tokens,
            loaded.dtype,
            self._backend.name,
            self._place,
        )
        self.facts = RankFacts(
            num_pages=self._affordable_pages(config, loaded.part.whole, page_bytes),
            page_tokens=page_tokens,
            page_bytes=page_bytes,
            weight_bytes=loaded.num_bytes,
            max_position=spec.max_position,
            vocab_size=spec.vocab_size,
            eos_token_ids=load_eos_token_ids(path),
            namespace=namespace,
        )

    @property
    def kernels(self) -> str:
        """For the log."""
        return self._backend.name

    @property
    def sums_in_shared_memory(self) -> bool:
        """Whether what tensor ranks add up goes through memory that they share."""
        return self._group is not None and self._group.is_shared

    def start(self, num_pages: int) -> RankRunner:
        """Allocates keys and values and makes everything ready to run, on the thread that will run the batches.

        All ranks get the same number of pages.
        """
        device, decoder = self._device, self._decoder
        pages = num_pages + device.spare_pages
        cache = PagedKVCache(
            decoder.spec, pages, device.page_tokens, self._kv_dtype, device.name, self._backend.kv_layout
        )
        forward = self._backend.forward(decoder, cache)
        sampler = device.sampler()
        draws: Draws = sampler
        if self._group is not None and self._place.is_last:
            draws = RanksSampler(sampler, self._group, decoder.part.vocabulary, decoder.spec.vocab_size)
        return RankRunner(
            forward,
            device.page_tokens,
            HostPages(cache) if device.name == "cpu" else DevicePages(cache),
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
        place, spec = self._place, self._decoder.spec
        if place.stages == 1:
            return None
        connections = self._meeting.connect("stages", place.rank, place.world, self._torch_device)
        size, dtype = place.tensor.size, self._decoder.dtype
        return Link(connections, place.rank, size, spec.hidden, dtype, _BATCHES_UNDER_WAY)

    def _affordable_pages(self, config: EngineConfig, whole: ModelSpec, page_bytes: int) -> int:
        """Raises ValueError, naming the setting to change, if there is room for none."""
        if config.kv.memory == "auto":
            # Ranks that share a machine share its memory; each GPU has its own.
            sharing = self._meeting.neighbours if self._device.name == "cpu" else 1
            budget = int(self._device.free_bytes() * config.kv.memory_share) // sharing
        else:
            replica_bytes = self._place.tensor.size * whole.layers * page_bytes // len(self._place.layers)
            budget = config.kv.memory * page_bytes // replica_bytes
        if budget < page_bytes:
            raise ValueError(
                f"rank {self._place.rank} has {budget} bytes for keys and values, less than one page of "
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
    if config.threads == "auto":
        config = config.model_copy(update={"threads": max(1, available_cores() // meeting.neighbours)})
    device = choose_device(config, int4=has_int4(config, path))
    loaded = LoadedRank(config, path, device, load_configured(config, path, device.name, place), meeting)
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
