"""Sums over ranks through shared memory: right, the same bits for all, and never waited for without end.

Ranks are threads here; the kernels run without the interpreter's lock, and memory of one process serves as well.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from engine.errors import RanksLost
from engine.kernels.cpu.dtypes import DTYPES
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.program import Immediate
from engine.kernels.cpu.ranks import SharedRanks, segment_bytes

dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=["float32", "bfloat16"])


def ranks_of(
    library: Library, size: int, num_bytes: int, threads: int = 1, timeout_s: float = 30.0
) -> list[SharedRanks]:
    segment = torch.zeros(segment_bytes(size, num_bytes) + 64, dtype=torch.uint8)
    segment = segment[-segment.data_ptr() % 64 :][: segment_bytes(size, num_bytes)]
    return [SharedRanks(segment, rank, size, library, threads, timeout_s) for rank in range(size)]


@dtypes
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_in_the_order_of_ranks_in_float32(
    library: Library, size: int, threads: int, dtype: torch.dtype
) -> None:
    """Many in a row of any shape: places are used again at once, by ranks that do not go at one pace."""
    shapes = [(1, 5), (3, 700), (1, 1), (17, 129), (2, 2048)] * 6
    torch.manual_seed(0)
    values = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(size)]
    ranks = ranks_of(library, size, 4 * 4096, threads)

    def run(rank: int) -> list[Tensor]:
        found = []
        for index, x in enumerate(values[rank]):
            if index % size == rank:
                time.sleep(0.001)
            found.append(ranks[rank].sum(Immediate(library, threads), x))
        return found

    with ThreadPoolExecutor(size) as pool:
        found = list(pool.map(run, range(size)))
    for index in range(len(shapes)):
        expected = values[0][index].float()
        for rank in range(1, size):
            expected = expected + values[rank][index].float()
        for rank in range(size):
            assert torch.equal(found[rank][index], expected.to(dtype)), (rank, index)
    ranks[0].check()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [0, 1, 4, 50])
def test_gathered_rows_are_those_of_each_rank(native_library: Library, rows: int, threads: int) -> None:
    """Also of more than the segment holds at once."""
    ranks = ranks_of(native_library, 2, 1000, threads)
    values = [torch.randn(rows, 30) for _ in ranks]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda rank: ranks[rank].gather(values[rank]), range(2))
    assert second is None
    assert first is not None and torch.equal(first, torch.stack(values, dim=1))


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_told(native_library: Library) -> None:
    ranks = ranks_of(native_library, 2, 1000, timeout_s=0.2)
    ranks[0].check()
    began = time.monotonic()
    ranks[0].sum(Immediate(native_library, 1), torch.ones(1, 4))
    assert 0.19 < time.monotonic() - began < 5
    with pytest.raises(RanksLost, match=r"one of 2 ranks that share a stage did not come within 0.2 s"):
        ranks[0].check()
    # Whoever comes late finds it broken, and waits for nobody.
    began = time.monotonic()
    ranks[1].sum(Immediate(native_library, 1), torch.ones(1, 4))
    assert time.monotonic() - began < 0.15
    with pytest.raises(RanksLost):
        ranks[1].gather(torch.ones(1, 4))


def test_more_than_the_segment_was_made_for_is_refused(native_library: Library) -> None:
    (rank, _) = ranks_of(native_library, 2, 128)
    with pytest.raises(ValueError, match="132 bytes of a rank; the segment was made for 128"):
        rank.sum(Immediate(native_library, 1), torch.ones(1, 33))
