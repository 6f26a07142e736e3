"""A decoder on a CUDA device: decodes as graphs, everything else operator by operator. Owns the choice between the two.

Knows no batch, no sequence, no sampling.
"""

import logging

import torch
from torch import Tensor

from engine.forward import cos_sin, finish, make_rope, opened_pages
from engine.kernels.cuda.attention import flash_obstacle
from engine.kernels.cuda.graphs import DecodeGraphs, Record
from engine.kernels.cuda.inputs import DecodeInputs, upload
from engine.kernels.operators import AttentionLayout, Wanted
from engine.kv.cache import PagedKVCache
from engine.models.decoder import Decoder
from engine.models.spec import DynamicScaling, ModelSpec, RopeSpec

log = logging.getLogger(__name__)


class CudaForward:
    """`engine.forward.Forward` over a cache on the device, whose last page belongs to no sequence.

    `device` is the host: steps are laid out there, and one copy takes a whole step over.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedKVCache,
        capability: tuple[int, int],
        *,
        max_sequences: int,
        record: Record | None,
    ) -> None:
        """`max_sequences` of a step; `record` makes graphs of decodes, None leaves them as they are."""
        self._decoder = decoder
        self._cache = cache
        self._place = cache.pages.device
        self._rope = make_rope(decoder.spec, self._place)
        self._obstacle = _flash_obstacle(decoder, cache, capability)
        if self._obstacle is not None:
            log.warning("attention gathers pages and is slow: flash attention cannot run with %s", self._obstacle)
        self._graphs = None if record is None else self._make_graphs(record, max_sequences)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @torch.inference_mode()
    def hidden(self, inputs: Tensor, layout: AttentionLayout, wanted: Wanted | None = None) -> Tensor:
        if not self._decoder.part.place.is_first:
            return self._later_stage(inputs, layout, wanted)
        token_ids = inputs
        if self._graphs is not None and self._graphs.fits(layout):
            hidden = self._graphs.run(token_ids, layout)
            return hidden if wanted is None else hidden.index_select(0, wanted.rows.to(self._place))
        if self._obstacle is not None:
            # Gathered pages bring slots along that were never written; flash attention reads no such slot.
            self._cache.clear(opened_pages(layout).to(self._place))
        placed = None if wanted is None else Wanted(*upload(wanted.rows, wanted.layout, self._place))
        return self._step(*upload(token_ids, layout, self._place), placed)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        if not torch.equal(rows, torch.arange(len(hidden))):
            hidden = hidden.index_select(0, rows.to(self._place, non_blocking=True))
        return self._decoder.logits(hidden)

    def wait(self) -> None:
        finish(self._place)

    def _later_stage(self, inputs: Tensor, layout: AttentionLayout, wanted: Wanted | None) -> Tensor:
        """Hidden states are on the device already; what goes there in place of token ids means nothing."""
        if self._obstacle is not None:
            self._cache.clear(opened_pages(layout).to(self._place))
        _, on_device = upload(layout.positions, layout, self._place)
        placed = None if wanted is None else Wanted(*upload(wanted.rows, wanted.layout, self._place))
        return self._step(inputs, on_device, placed)

    def _step(self, token_ids: Tensor, layout: AttentionLayout, wanted: Wanted | None = None) -> Tensor:
        return self._decoder.forward(token_ids, layout, cos_sin(self._rope, layout), self._cache, wanted)

    def _make_graphs(self, record: Record, max_sequences: int) -> DecodeGraphs | None:
        if not self._decoder.part.place.is_first:
            log.info("decodes of a later stage run without CUDA graphs")
            return None
        obstacle = graph_obstacle(self._decoder.spec, self._obstacle)
        if obstacle is not None:
            log.warning("decodes run without CUDA graphs: %s", obstacle)
            return None
        spec, cache = self._decoder.spec, self._cache
        spare_page = cache.num_pages - 1
        columns = max(1, min(spare_page, -(-spec.max_position // cache.page_tokens)))
        inputs = DecodeInputs(max_sequences, columns, cache.page_tokens, spare_page, self._place)
        width = (spec.embedding_dim or spec.hidden) if self._decoder.part.place.is_last else spec.hidden
        with torch.inference_mode():
            return DecodeGraphs(self._step, inputs, max_sequences, width, self._decoder.dtype, record)


def graph_obstacle(spec: ModelSpec, flash: str | None) -> str | None:
    """Why a model's decodes cannot be recorded, in words; None if they can. `flash` is its `flash_obstacle`."""
    if flash is not None:
        return "gathered pages are planned anew for the lengths of each step"
    if isinstance(spec.positions, RopeSpec) and isinstance(spec.positions.scaling, DynamicScaling):
        return "dynamic NTK computes its frequencies from constants that it brings from the host in each step"
    return None


def _flash_obstacle(decoder: Decoder, cache: PagedKVCache, capability: tuple[int, int]) -> str | None:
    return flash_obstacle(
        capability=capability,
        page_tokens=cache.page_tokens,
        head_dim=decoder.spec.head_dim,
        dtype=decoder.dtype,
        kv_dtype=cache.dtype,
    )
