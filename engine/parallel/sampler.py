"""Drawing tokens where each rank has the logits of a part of the vocabulary. Only rank 0 draws.

Of a row that is greedy and nothing else, ranks bring their largest logit and its id; of any other, all its logits: what
is drawn is what one rank with all of them would draw.
"""

from collections.abc import Sequence as SequenceOf
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.batch import Samples, TokenLogprob
from engine.sampler import Drawn, Sampler, take_rows, unusable

_IGNORED = Drawn([], [])


class Gathering(Protocol):
    """Brings together what the ranks have."""

    def gather(self, x: Tensor) -> Tensor | None:
        """[T, N] of each rank, all of one shape, to [T, size, N] of rank 0; None of the others."""


class RanksSampler:
    """A sampler of ranks that hold consecutive parts of the vocabulary, rank 0 the first.

    Logits are [R, V] of the rank's own ids, then of those that pad them to the same V on every rank. All ranks call the
    same methods for the same rows; those that do not draw return nothing of meaning.
    """

    def __init__(self, sampler: Sampler, ranks: Gathering, held: range, vocabulary: int) -> None:
        """`held` are this rank's ids of the `vocabulary` that there are."""
        self._sampler = sampler
        self._ranks = ranks
        self._held = held
        self._vocabulary = vocabulary

    def sample(self, logits: Tensor, samples: Samples) -> Drawn:
        """See `Sampler.sample`."""
        if not len(samples):
            return _IGNORED
        whole = sorted({*np.flatnonzero(samples.settings["temperature"]).tolist(), *samples.edits, *samples.logprobs})
        greedy = sorted(set(range(len(samples))) - set(whole))
        best = self._ranks.gather(self._largest(logits)) if greedy else None
        gathered = self._gather(logits if not greedy else logits[whole]) if whole else None
        if best is None and gathered is None:
            return _IGNORED
        return _merged(
            len(samples),
            (greedy, Drawn([], []) if best is None else _most_probable(best[greedy])),
            (whole, Drawn([], []) if gathered is None else self._sampler.sample(gathered, take_rows(samples, whole))),
        )

    def token_logprobs(self, logits: Tensor, targets: SequenceOf[int], top: int) -> tuple[TokenLogprob, ...]:
        """See `Sampler.token_logprobs`."""
        gathered = self._gather(logits)
        return () if gathered is None else self._sampler.token_logprobs(gathered, targets, top)

    def _largest(self, logits: Tensor) -> Tensor:
        """[R, 2] float64: the largest logit of each row here, and its id."""
        if not len(self._held):
            return torch.tensor([[-torch.inf, self._vocabulary]], dtype=torch.float64).repeat(len(logits), 1)
        values, ids = self._sampler.largest(logits[:, : len(self._held)])
        found = torch.tensor([values, ids], dtype=torch.float64).T.contiguous()
        found[:, 1] += self._held.start
        return found.to(logits.device)

    def _gather(self, logits: Tensor) -> Tensor | None:
        """[R, vocabulary] on rank 0."""
        parts = self._ranks.gather(logits)
        if parts is None:
            return None
        return parts.flatten(1)[:, : self._vocabulary]


def _most_probable(found: Tensor) -> Drawn:
    """Of [R, size, 2] largest logits and their ids: the largest of all, the lowest id of equal ones."""
    values, ids = found.cpu().unbind(2)
    # Ids rise with the ranks, and the first of equal values is taken; NaN is larger than any number.
    best, rank = values.max(dim=1)
    failed = unusable(best.tolist())
    token_ids = [int(token) for token in ids.gather(1, rank.unsqueeze(1))[:, 0].tolist()]
    return Drawn([0 if row in failed else token for row, token in enumerate(token_ids)], [None] * len(best), failed)


def _merged(count: int, *parts: tuple[list[int], Drawn]) -> Drawn:
    """Drawn rows put where they are among all `count`."""
    token_ids, logprobs = [0] * count, list[TokenLogprob | None]([None] * count)
    failed: dict[int, str] = {}
    for rows, drawn in parts:
        for place, row in enumerate(rows):
            token_ids[row], logprobs[row] = drawn.token_ids[place], drawn.logprobs[place]
        failed |= {rows[place]: reason for place, reason in drawn.failed.items()}
    return Drawn(token_ids, logprobs, failed)
