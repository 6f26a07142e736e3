"""What one of several batches in flight takes of the work, so that the stages of a pipeline have equally much to do.

Applies `engine.policy` to sequences; a lone batch takes all there is. Changes no sequence.
"""

from collections.abc import Iterable, Iterator

from engine.batching import Chunk
from engine.policy import batch_share, chunk_tokens, prompt_share, spread_share
from engine.sequence import Sequence

_SPREAD = 8
"""Batches, for each of those in flight, over which prompts are spread: the more, the more alike are batches, and the
later is the first token."""


class Parts:
    """The parts of an iteration."""

    def __init__(self, depth: int) -> None:
        """`depth`: batches that are to be in flight at once."""
        self._depth = depth

    def decodes(self, running: list[Sequence]) -> int:
        """Sequences that decode in the next batch, at most: of those that have computed all but their last token, in
        flight or not."""
        if self._depth == 1:
            return len(running)
        return batch_share(sum(sequence.num_remaining <= 1 for sequence in running), self._depth)

    def prompts(
        self, running: Iterable[Sequence], waiting: Iterable[Sequence], budget: int, least: int | None, num_decodes: int
    ) -> "Prompts":
        """Those of the next batch, beside so many decodes, with `budget` tokens at most. `waiting` are the sequences
        for whom there is a place; `least` is how many tokens there are to be, None where nobody decodes or prompts come
        first."""
        if self._depth == 1:
            return Prompts(budget, cuts_all=True)
        left = _prompts(running, waiting)
        if least is None:
            budget = prompt_share(left, self._depth, budget)
        else:
            budget = spread_share(left, _SPREAD * self._depth, least, budget)
        return Prompts(budget, cuts_all=num_decodes > 0)


class Prompts:
    """The prompts of a batch, in chunks."""

    def __init__(self, budget: int, *, cuts_all: bool) -> None:
        """Without `cuts_all` only the first one leaves some of its prompt: the rest of another would have to wait until
        this batch is back, and the next one could be short of prompts and have nothing at all to run. With decodes
        there is something to run in any case, and batches are alike when each takes all the tokens that it may."""
        self.chunks: list[Chunk] = []
        self.left = budget
        """Tokens."""
        self._cuts_all = cuts_all

    def add(self, sequence: Sequence) -> None:
        """Adds the sequence's next chunk; where it is not to be cut here, no other has a place either."""
        count = chunk_tokens(sequence.num_remaining, self.left)
        if self.chunks and not self._cuts_all and count < sequence.num_remaining:
            self.close()
            return
        self.chunks.append(Chunk(sequence, count))
        self.left -= count

    def close(self) -> None:
        """There is to be no other."""
        self.left = 0


def _prompts(running: Iterable[Sequence], waiting: Iterable[Sequence]) -> Iterator[int]:
    """What is left of each prompt that could run now, in order."""
    for sequence in running:
        if not sequence.in_flight and sequence.num_remaining > 1:
            yield sequence.num_remaining
    for sequence in waiting:
        yield sequence.num_remaining
