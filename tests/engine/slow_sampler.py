"""The oracle of `engine.sampler`: one row at a time, whole sorts, no shortcuts, numpy alone."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from engine.batch import SampleRow

Array = NDArray[np.float32]


def edited(logits: Array, row: SampleRow) -> Array:
    """Logits after bias, allowed and banned tokens and penalties, in float32 like the engine's."""
    params, result = row.params, logits.copy()
    for token, bias in (params.logit_bias or {}).items():
        result[token] += np.float32(bias)
    for token in range(len(result)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            result[token] = -np.inf
    for token in row.banned:
        result[token] = -np.inf
    for token in {*row.prompt, *row.output}:
        penalty = np.float32(params.repetition_penalty)
        result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
    for token, count in Counter(row.output).items():
        result[token] -= np.float32(params.frequency_penalty) * np.float32(count)
        result[token] -= np.float32(params.presence_penalty)
    return result


def distribution(logits: Array, row: SampleRow, nudge: float = 0.0) -> NDArray[np.float64]:
    """Probability of every token; `nudge` moves the borders of min_p and top_p by this share."""
    params, values = row.params, edited(logits, row)
    order = np.lexsort((np.arange(len(values)), -values))
    if params.greedy:
        return np.eye(len(values))[order[0]]
    weights = np.exp((values.astype(np.float64) - values[order[0]]) / params.temperature)[order]
    weights[weights < params.min_p * (1 + nudge)] = 0
    if params.top_k:
        weights[params.top_k :] = 0
    if params.top_p < 1:
        before = np.concatenate(([0.0], np.cumsum(weights)[:-1]))
        weights[before >= params.top_p * (1 + nudge) * weights.sum()] = 0
    result = np.empty(len(values))
    result[order] = weights / weights.sum()
    return result


def explains(probabilities: NDArray[np.float64], token: int, uniform: float) -> bool:
    """Whether the inverse CDF in token-id order gives `token`, up to float32 rounding of the weights."""
    above = probabilities[: token + 1].sum()
    below = above - probabilities[token]
    return bool(probabilities[token] > 0 and below - 1e-5 <= uniform <= above + 1e-5)
