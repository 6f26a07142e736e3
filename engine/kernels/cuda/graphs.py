"""Decodes as CUDA graphs: which batch sizes are recorded, recording them, and running a step on one of them.

A decode of a small batch has a few hundred launches of microseconds each; launched one by one from Python they take
longer than the device does. A graph launches all of them at once, on the memory it was recorded with.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from engine.kernels.cuda.inputs import DecodeInputs
from engine.kernels.operators import AttentionLayout

FIRST_RUNGS = (1, 2, 4, 8)
RUNG = 8
"""From 8 sequences on, a size for each multiple of this: at most 7 rows of padding."""

log = logging.getLogger(__name__)

Replay = Callable[[], None]
Step = Callable[[Tensor, AttentionLayout], Tensor]
"""Token ids and layout on the device to hidden states [T, width]."""


class Record(Protocol):
    """How a piece of device work is recorded: `CudaRecorder`, or a stand-in where there is no device."""

    def __call__(self, work: Callable[[], None]) -> Replay:
        """Records `work`; calling the result does it again on the same memory."""


def ladder(max_sequences: int) -> list[int]:
    """Batch sizes to record, ascending; the last one is `max_sequences`."""
    sizes = {*FIRST_RUNGS, *range(2 * RUNG, max_sequences, RUNG), max_sequences}
    return sorted(size for size in sizes if size <= max_sequences)


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, work: Callable[[], None]) -> Replay:
        # The first run compiles kernels and lets libraries set up their workspaces, neither of which can be recorded.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay


class DecodeGraphs:
    """A recording of one decode step for each size of the ladder."""

    def __init__(
        self, step: Step, inputs: DecodeInputs, max_sequences: int, width: int, dtype: torch.dtype, record: Record
    ) -> None:
        """`width` and `dtype` are those of what `step` returns."""
        began = time.monotonic()
        self._inputs = inputs
        self._sizes = ladder(max_sequences)
        device = inputs.step(1)[0].device
        self._hidden = torch.empty((max_sequences, width), dtype=dtype, device=device)
        self._replays: dict[int, Replay] = {}
        # Largest first: the smaller ones then fit into the pool's memory as it is.
        for size in reversed(self._sizes):
            self._replays[size] = record(self._work(step, size))
        log.info(
            "%d CUDA graphs for 1 to %d sequences: %.1f s", len(self._sizes), max_sequences, time.monotonic() - began
        )

    def fits(self, layout: AttentionLayout) -> bool:
        """Whether `run` can do this step."""
        return self._inputs.fits(layout)

    def run(self, token_ids: Tensor, layout: AttentionLayout) -> Tensor:
        """Hidden states [T, width] of a step that fits and that the host laid out; valid until the next run."""
        count = len(token_ids)
        size = self._sizes[bisect_left(self._sizes, count)]
        self._inputs.fill(token_ids, layout, size)
        self._replays[size]()
        return self._hidden[:count]

    def _work(self, step: Step, size: int) -> Callable[[], None]:
        def work() -> None:
            self._hidden[:size].copy_(step(*self._inputs.step(size)))

        return work
