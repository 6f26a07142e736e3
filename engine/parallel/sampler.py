"""Drawing tokens where each rank has the logits of a part of the vocabulary. Only rank 0 draws.

Of a row that is greedy and nothing else, ranks bring their largest logit and its id; of one that draws among its top_k,
so many of them; of any other, all its logits. What is drawn is what one rank with all of them would draw.
"""

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.batch import Samples, TokenLogprob
from engine.sampler import Drawn, Sampler, take_logits, take_rows, unusable

_COST_OF_CANDIDATES = 8
"""Logits that are brought for what a candidate costs: its value and id in 64 bits take four, the search for it more."""


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
            return Drawn([], [])
        roads = _roads(samples, logits.shape[1])
        best = self._ranks.gather(self._largest(logits)) if roads.greedy else None
        chosen = self._among(logits, samples, roads.among) if roads.among else None
        gathered = self._gather(take_logits(logits, roads.whole)) if roads.whole else None
        if best is None and chosen is None and gathered is None:
            return Drawn([], [])
        return _merged(
            len(samples),
            (roads.greedy, Drawn([], []) if best is None else _most_probable(best[roads.greedy])),
            *(
                (rows, self._sampler.sample(found, take_rows(samples, rows)))
                for rows, found in ((roads.among, chosen), (roads.whole, gathered))
                if found is not None
            ),
        )

    def token_logprobs(self, logits: Tensor, targets: SequenceOf[int], top: int) -> tuple[TokenLogprob, ...]:
        """See `Sampler.token_logprobs`."""
        gathered = self._gather(logits)
        return () if gathered is None else self._sampler.token_logprobs(gathered, targets, top)

    def _largest(self, logits: Tensor) -> Tensor:
        """[R, 2] float64: the largest logit of each row here, and its id."""
        if not len(self._held):
            return torch.tensor([[-torch.inf, self._vocabulary - 1]], dtype=torch.float64).repeat(len(logits), 1)
        values, ids = self._sampler.largest(logits[:, : len(self._held)])
        found = torch.tensor([values, ids], dtype=torch.float64).T.contiguous()
        found[:, 1] += self._held.start
        return found.to(logits.device)

    def _among(self, logits: Tensor, samples: Samples, rows: list[int]) -> Tensor | None:
        """[R, vocabulary] of these rows on rank 0: of each rank the largest logits, as many as the largest top_k, and
        -inf elsewhere. Of equal ones those with the lowest ids, so that the largest of the whole row are among them."""
        count = int(samples.settings["top_k"][rows].max())
        logits = take_logits(logits, rows)
        brought = self._ranks.gather(torch.cat((self._largest(logits)[:, None], self._k_largest(logits, count)), dim=1))
        if brought is None:
            return None
        values, ids = brought.flatten(1, 2).unbind(2)
        found = torch.full((len(rows), self._vocabulary), -torch.inf, device=logits.device)
        # NaN wins: the largest of a row tells that nothing can be drawn from it.
        return found.scatter_reduce_(1, ids.long(), values.float(), "amax")

    def _k_largest(self, logits: Tensor, count: int) -> Tensor:
        """[R, count, 2] float64: the largest logits of each row here and their ids; -inf and 0 where that is all."""
        found = torch.tensor([-torch.inf, 0.0], dtype=torch.float64, device=logits.device).repeat(len(logits), count, 1)
        if held := min(count, len(self._held)):
            values, ids = self._sampler.k_largest(logits[:, : len(self._held)], held)
            found[:, :held, 0] = values
            found[:, :held, 1] = (ids + self._held.start).masked_fill(values == -torch.inf, 0)
        return found

    def _gather(self, logits: Tensor) -> Tensor | None:
        """[R, vocabulary] on rank 0."""
        parts = self._ranks.gather(logits)
        if parts is None:
            return None
        return parts.flatten(1)[:, : self._vocabulary]


class _Roads(NamedTuple):
    """Rows by what ranks bring of them, in rising order."""

    greedy: list[int]
    """The largest logit."""
    among: list[int]
    """The largest ones, as many as top_k."""
    whole: list[int]
    """All."""


def _roads(samples: Samples, width: int) -> _Roads:
    """`width` are the logits of each rank. The same on every rank, which do not all know what edits are."""
    is_random, top_k = samples.settings["temperature"] != 0, samples.settings["top_k"]
    is_whole = is_random & ((top_k == 0) | (_COST_OF_CANDIDATES * top_k > width))
    is_whole[[*samples.edits, *samples.logprobs]] = True
    masks = (~is_random & ~is_whole, is_random & ~is_whole, is_whole)
    return _Roads(*(np.flatnonzero(mask).tolist() for mask in masks))


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
