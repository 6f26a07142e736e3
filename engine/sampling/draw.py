"""Random draws: temperature, min_p, top_k and top_p over edited logits, then the inverse CDF in token-id order.

Each row takes the cheapest road that is exact for its filters; only a top_k near the vocabulary's size sorts it whole.
Knows neither history nor where the random numbers come from.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling.reductions import (
    Reductions,
    block_total,
    first_above,
    first_above_in_blocks,
    padded_length,
)

_LEADING = 64
"""Most nuclei of a trained model fit in this many tokens, and finding them costs little more than finding one."""
_TOP_K_GROUPS = (64, 1024)
"""Rows whose top_k is at most this are cut together, so that one large top_k is not paid for by every row."""
_HALVINGS = 8
_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True, slots=True)
class Rows:
    """What R rows draw from and by. Everything per row is a column [R, 1] on the device of the logits."""

    logits: Tensor
    """[R, V] float32, only read."""
    best: Tensor
    """float32, the largest logit: finite."""
    uniform: Tensor
    """float64 in [0, 1)."""
    temperature: Tensor
    """float32, positive."""
    min_p: Tensor
    """float32."""
    top_k: Tensor
    """int64; the vocabulary's size where every token is kept."""
    top_p: Tensor
    """float64."""

    @classmethod
    def of(cls, logits: Tensor, best: Tensor, uniform: Tensor, settings: NDArray[np.void]) -> "Rows":
        """Rows of positive temperature; `best` and `uniform` are [R], `settings` [R] of `engine.batch.SETTINGS`."""
        vocabulary = logits.shape[1]
        # Outside float32's normal range a temperature would become 0 or inf, and the weights NaN.
        temperature = settings["temperature"].clip(_FLOAT32.tiny, _FLOAT32.max)
        top_k = settings["top_k"].clip(max=vocabulary)

        def column(values: NDArray[np.generic], dtype: type[np.generic]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype)).to(logits.device)[:, None]

        return cls(
            logits,
            best[:, None],
            uniform[:, None],
            column(temperature, np.float32),
            column(settings["min_p"], np.float32),
            column(np.where(top_k == 0, vocabulary, top_k), np.int64),
            column(settings["top_p"], np.float64),
        )

    def take(self, rows: Tensor) -> "Rows":
        """The rows of these indices, in order; no copy when they are all of them."""
        if len(rows) == len(self.logits):
            return self
        return Rows(*(getattr(self, f.name)[rows] for f in fields(self)))

    def weights(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        """Probabilities [R, N] of tokens with these logits relative to the most probable one's; 0 below min_p."""
        # Subtracting before dividing keeps the exponent at most 0: nothing overflows at any temperature.
        weights = torch.sub(logits, self.best, out=out).div_(self.temperature).exp_()
        if (self.min_p > 0).any():
            weights.masked_fill_(weights < self.min_p, 0.0)
        return weights

    def all_weights(self) -> Tensor:
        """Weights [R, n * BLOCK] of the whole vocabulary, zero past its end."""
        vocabulary = self.logits.shape[1]
        weights = self.logits.new_empty(len(self.logits), padded_length(vocabulary))
        weights[:, vocabulary:] = 0.0
        self.weights(self.logits, out=weights[:, :vocabulary])
        return weights


def draw(rows: Rows, reductions: Reductions) -> Tensor:
    """Draws one token of each row, as ids [R] int64."""
    vocabulary = rows.logits.shape[1]
    ids = torch.empty(len(rows.logits), dtype=torch.int64, device=rows.logits.device)
    unlimited = rows.top_k >= vocabulary
    nucleus = unlimited & (rows.top_p < 1.0)
    groups = [(unlimited & ~nucleus, _draw_from_all), (nucleus, _draw_from_nucleus)]
    floor = 0
    for ceiling in (*_TOP_K_GROUPS, vocabulary):
        groups.append((~unlimited & (rows.top_k > floor) & (rows.top_k <= ceiling), _draw_from_top_k))
        floor = ceiling
    for members, method in groups:
        if members.any():
            where = members.squeeze(1).nonzero().squeeze(1)
            ids[where] = method(rows.take(where), reductions)
    return ids


def _draw_from_all(rows: Rows, reductions: Reductions) -> Tensor:
    return first_above_in_blocks(rows.all_weights(), rows.uniform)


def _draw_from_top_k(rows: Rows, reductions: Reductions) -> Tensor:
    k = int(rows.top_k.max())
    values, candidates = reductions.k_largest(rows.logits, k)
    weights = rows.weights(values)
    weights.masked_fill_(torch.arange(k, device=weights.device) >= rows.top_k, 0.0)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    kept = weights * _in_nucleus(weights, cumulative, rows.top_p * cumulative[:, -1:])
    return _draw_from_candidates(rows, candidates, kept)


def _draw_from_nucleus(rows: Rows, reductions: Reductions) -> Tensor:
    """top_p alone: from the leading tokens where these hold the mass, else the vocabulary is searched for the cut."""
    every = rows.all_weights()
    mass = rows.top_p * block_total(every)
    k = min(_LEADING, rows.logits.shape[1])
    values, candidates = reductions.k_largest(rows.logits, k)
    weights = rows.weights(values)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    ids = _draw_from_candidates(rows, candidates, weights * _in_nucleus(weights, cumulative, mass))
    wide = (cumulative[:, -1:] < mass) & (weights[:, -1:] > 0)
    if k < rows.logits.shape[1] and wide.any():
        where = wide.squeeze(1).nonzero().squeeze(1)
        if len(where) < len(every):
            every = every[where]
        ids[where] = _draw_from_wide_nucleus(rows.take(where), every, mass[where], values[where, -1:])
    return ids


def _draw_from_wide_nucleus(rows: Rows, every: Tensor, mass: Tensor, high: Tensor) -> Tensor:
    """Bisects for the logit at which the nucleus ends, then orders only the tokens near it.

    every is `rows.all_weights()`, mass [R, 1] what the nucleus must hold, high [R, 1] a logit above which lies less.
    The nucleus ends at a logit in (low, high] throughout.
    """
    logits, vocabulary = rows.logits, rows.logits.shape[1]
    # One buffer for all the halvings: fresh memory of this size costs more than the arithmetic.
    kept = torch.zeros_like(every)
    inside = kept[:, :vocabulary]

    def keep_above(logit: Tensor) -> None:
        # Compared straight into floats: multiplying by booleans takes several times longer.
        torch.gt(logits, logit, out=inside)
        torch.mul(kept, every, out=kept)

    # Even V tokens at this logit would hold less than the share to drop, so all that may be dropped lies above it.
    total = mass / rows.top_p
    low = (rows.best + rows.temperature * ((total - mass) / vocabulary).log() - 1e-3).float()
    keep_above(high)
    before = block_total(kept)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        keep_above(middle)
        above = block_total(kept)
        enough = above >= mass
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        before = torch.where(enough, before, above)
    values, candidates = _between(logits, low, high)
    edge = rows.weights(values)
    edge *= _in_nucleus(edge, edge.cumsum(-1, dtype=torch.float64), mass - before)
    keep_above(high)
    # Candidates beyond a row's own are of weight 0: adding them changes nothing.
    kept.scatter_add_(1, candidates, edge)
    return first_above_in_blocks(kept, rows.uniform)


def _between(logits: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of each row in (low, high], largest first, equal ones by rising id, and their ids: [R, k] both.

    k is the largest number that a row has; in shorter rows -inf and id 0 follow.
    """
    rows, ids = ((logits > low) & (logits <= high)).nonzero(as_tuple=True)
    counts = rows.bincount(minlength=len(logits))
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    shape = len(logits), max(1, int(counts.max()))
    values = logits.new_full(shape, -torch.inf).index_put_((rows, places), logits[rows, ids])
    # In order of id already, which a stable sort keeps among equals.
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, ids.new_zeros(shape).index_put_((rows, places), ids).gather(1, order)


def _in_nucleus(weights: Tensor, cumulative: Tensor, mass: Tensor) -> Tensor:
    """Whether each token, most probable first, is in the smallest set of at least `mass` [R, 1].

    It is while the mass before it falls short (nucleus sampling, Holtzman et al., 2020, section 3.1).
    """
    return cumulative - weights < mass


def _draw_from_candidates(rows: Rows, candidates: Tensor, weights: Tensor) -> Tensor:
    """Draws among token ids [R, k] with these weights, in token-id order as if they stood in the whole vocabulary."""
    candidates, order = candidates.sort(dim=-1)
    return candidates.gather(1, first_above(weights.gather(1, order), rows.uniform)).squeeze(1)
