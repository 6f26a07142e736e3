"""What ranks do together: add up, gather, hand hidden states on. Owns the ways of doing it, and no arithmetic.

Ranks of one host add up in shared memory, inside the step program; others over connections of torch.
"""

from collections import deque

import torch
from torch import Tensor
from torch.distributed import GatherOptions, Work

from engine.errors import RanksLost
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.ranks import CalledRanks, CpuRanks, SharedRanks, segment_bytes
from engine.parallel.meeting import Connections, Meeting
from engine.parallel.segment import share_segment


class TensorGroup:
    """The tensor ranks of one stage. All of them call the same methods in the same order."""

    def __init__(self, meeting: Meeting, group: Connections) -> None:
        """`group` has the stage's ranks, on the device of their tensors."""
        self._meeting = meeting
        self._group = group
        self._shared: SharedRanks | None = None
        place = meeting.place
        self.rank = place.tensor.rank
        self.size = place.tensor.size

    def in_program(self, library: Library, threads: int, rank_bytes: int) -> CpuRanks:
        """Sums for a recorded program: in memory that the ranks share if they are on one host, else through torch.

        `rank_bytes` is the most that a rank brings at once. From then on everything goes the same way.
        """
        store = self._meeting.store(f"segment/{self._meeting.place.stage}")
        segment = share_segment(store, self.rank, self.size, segment_bytes(self.size, rank_bytes))
        if segment is None:
            return CalledRanks(self.sum)
        seconds = self._meeting.timeout.total_seconds()
        self._shared = SharedRanks(segment, self.rank, self.size, library, threads, seconds)
        return self._shared

    @property
    def is_shared(self) -> bool:
        """Whether sums go through shared memory."""
        return self._shared is not None

    def sum(self, x: Tensor) -> Tensor:
        """See `engine.kernels.Operators.sum_over_ranks`. Half precision rounds once for each rank. Raises RanksLost."""
        x = x.contiguous()
        if x.numel():
            finish(self._group.allreduce([x]), "adding up")
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        """[T, N] of each rank, all of one shape, to [T, size, N] of rank 0; None of the others. Raises RanksLost."""
        if self._shared is not None:
            return self._shared.gather(x)
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        if x.numel():
            root = GatherOptions()
            root.rootRank = 0
            finish(self._group.gather([found] if found else [], [x], root), "gathering")
        return torch.stack(found, dim=1) if found else None

    def check(self) -> None:
        """Raises RanksLost if a sum since the last check means nothing, for want of a rank."""
        if self._shared is not None:
            self._shared.check()


class Link:
    """Hidden states from stage to stage: tensor rank r of one sends to rank r of the next, all that they have.

    Both sides know the sizes from the batch. Sending copies and returns; what is sent arrives in order.
    """

    def __init__(self, group: Connections, rank: int, stride: int, width: int, dtype: torch.dtype, depth: int) -> None:
        """`rank` in the group of the replica, in which the neighbours are `stride` before and behind; `depth` batches
        may be on their way before sending waits for the oldest."""
        self._group = group
        self._before = rank - stride
        self._behind = rank + stride
        self._width = width
        self._dtype = dtype
        self._depth = depth
        self._received = 0
        self._numbered = 0
        self._sending: deque[tuple[Work, Tensor]] = deque()

    def receive(self, tokens: int, device: torch.device) -> Tensor:
        """[tokens, width] of the stage before. Raises RanksLost."""
        hidden = torch.empty(tokens, self._width, dtype=self._dtype, device=device)
        finish(self._group.recv([hidden], self._before, _tag(self._received)), "receiving hidden states")
        self._received += 1
        return hidden

    def send(self, hidden: Tensor) -> None:
        """To the stage behind. Raises RanksLost, also for what was sent before."""
        while len(self._sending) >= self._depth:
            finish(self._sending.popleft()[0], "sending hidden states")
        copy = hidden.clone()
        self._sending.append((self._group.send([copy], self._behind, _tag(self._numbered)), copy))
        self._numbered += 1


def _tag(number: int) -> int:
    """Distinct for batches that are on their way at once."""
    return number % 2**16


def finish(work: Work, doing: str) -> None:
    """Waits for what was begun. Raises RanksLost."""
    try:
        work.wait()
    except RuntimeError as error:
        raise RanksLost(f"{doing}: {error}") from error
