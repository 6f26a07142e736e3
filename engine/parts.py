"""What one of several batches in flight takes of the work, so that the stages of a pipeline have equally much to do.

Applies `engine.policy` to sequences; a lone batch takes all there is. Changes nothing but the list of chunks.
"""

from collections.abc import Iterable, Iterator

from engine.batching import Chunk
from engine.policy import batch_share, chunk_tokens, prompt_share, spread_share
from engine.sequence import Sequence

_SPREAD = 8
"""Batches, for each of those in flight, over which prompts are spread. With 2 stages and as many tokens read as written
these wait for a tenth of the time, and for a quarter of it where prompts are not spread; the more batches, the later is
the first token."""


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

    def prompt_tokens(
        self, running: Iterable[Sequence], waiting: Iterable[Sequence], budget: int, least_beside: int | None
    ) -> int:
        """Tokens of prompts in the next batch, at most. `waiting` are those for whom there is a place; `least_beside`
        is how many there are to be beside decodes, None where nobody decodes or prompts come first."""
        if self._depth == 1:
            return budget
        prompts = _prompts(running, waiting)
        if least_beside is None:
            return prompt_share(prompts, self._depth, budget)
        return spread_share(prompts, _SPREAD * self._depth, least_beside, budget)

    def add(self, chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
        """Adds the sequence's next chunk, and returns its tokens; 0 if the batch after this one is to have it.

        With several in flight only the first chunk of a batch leaves some of its prompt: the rest of another would have
        to wait until this batch is back, and the next one would be short of it.
        """
        count = chunk_tokens(sequence.num_remaining, budget)
        if self._depth > 1 and chunks and count < sequence.num_remaining:
            return 0
        chunks.append(Chunk(sequence, count))
        return count


def _prompts(running: Iterable[Sequence], waiting: Iterable[Sequence]) -> Iterator[int]:
    """What is left of each prompt that could run now, in order."""
    for sequence in running:
        if not sequence.in_flight and sequence.num_remaining > 1:
            yield sequence.num_remaining
    for sequence in waiting:
        yield sequence.num_remaining
