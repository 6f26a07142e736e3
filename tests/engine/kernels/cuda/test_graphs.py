"""Which sizes are recorded, which one a step runs on, and on a GPU that a replay does what was recorded."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.cuda.graphs import RUNG, CudaRecorder, DecodeGraphs, Replay, ladder
from engine.kernels.cuda.inputs import DecodeInputs
from engine.kernels.operators import AttentionLayout
from tests.engine.kernels.cuda.device import DEVICE, needs_gpu
from tests.engine.kernels.cuda.layouts import make_layout


@given(st.integers(1, 600))
def test_every_size_has_a_rung_that_wastes_little(max_sequences: int) -> None:
    sizes = ladder(max_sequences)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == max_sequences
    for count in range(1, max_sequences + 1):
        size = min(size for size in sizes if size >= count)
        assert size - count < min(count, RUNG)


def test_the_ladder_by_name() -> None:
    assert ladder(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    assert ladder(3) == [1, 2, 3]
    assert ladder(20) == [1, 2, 4, 8, 16, 20]


class Recordings:
    """Stands in for a recorder: runs the work again, and remembers what was asked for."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed: list[int] = []

    def __call__(self, work: Callable[[], None]) -> Replay:
        number = self.recorded
        self.recorded += 1
        work()

        def replay() -> None:
            self.replayed.append(number)
            work()

        return replay


def sums(token_ids: torch.Tensor, layout: AttentionLayout) -> torch.Tensor:
    """[T, 2] float32 that depends on every array of a row."""
    row = layout.positions + layout.contexts + layout.slots + layout.context_lens + layout.page_table[:, 0]
    return torch.stack((token_ids, row), dim=1).to(torch.float32)


@pytest.mark.parametrize("record", [Recordings, pytest.param(CudaRecorder, marks=needs_gpu)])
def test_a_step_runs_on_the_next_size_and_returns_its_own_rows(record: type[Recordings] | type[CudaRecorder]) -> None:
    recorder = record()
    with torch.inference_mode():
        graphs = DecodeGraphs(sums, DecodeInputs(9, 5, 4, 30, DEVICE), 9, 2, torch.float32, recorder)
        for count in (3, 9, 1, 4, 8, 5):
            lens = tuple(range(1, count + 1))
            layout = make_layout((1,) * count, lens, page_tokens=4, device=torch.device("cpu"))
            assert graphs.fits(layout)
            expected = sums(torch.arange(count), layout)
            assert torch.equal(graphs.run(torch.arange(count), layout).cpu(), expected)
    if isinstance(recorder, Recordings):
        # Recorded largest first: 9, 8, 4, 2, 1.
        assert recorder.recorded == 5 and recorder.replayed == [2, 0, 4, 2, 1, 1]
