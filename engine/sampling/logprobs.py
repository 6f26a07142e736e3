"""Natural-log probabilities of chosen tokens under the raw logits. Knows nothing of how the tokens were chosen."""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from engine.batch import TokenLogprob
from engine.sampling import reductions as torch_reductions
from engine.sampling.reductions import Reductions

_SCRATCH_FLOATS = 2**23
"""Logits worked on at once: a prompt chunk's [R, V] would otherwise be doubled."""


def token_logprobs(
    logits: Tensor, targets: SequenceOf[int], top: int, reductions: Reductions = torch_reductions
) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of `targets[i]` and of the `top` most probable tokens under softmax(logits[i]).

    logits is [R, V] of any float type, `targets` R ids in [0, V). Equal logits share a rank, and are listed lowest id
    first; tokens whose logit is -inf are not listed, so `top` may come out shorter. A row with NaN or +inf yields NaN.

    Raises ValueError when a target is not in the vocabulary or their number is not R.
    """
    rows, vocabulary = logits.shape
    if len(targets) != rows:
        raise ValueError(f"expected one target for each of {rows} rows of logits, got {len(targets)}")
    if outside := [t for t in targets if not 0 <= t < vocabulary]:
        raise ValueError(f"target token {outside[0]} is not in the vocabulary of {vocabulary} tokens")
    step = max(1, _SCRATCH_FLOATS // vocabulary)
    found: list[TokenLogprob] = []
    for start in range(0, rows, step):
        piece = logits[start : start + step].float()
        found += _piece(piece, targets[start : start + step], min(top, vocabulary), reductions)
    return tuple(found)


def _piece(logits: Tensor, targets: SequenceOf[int], top: int, reductions: Reductions) -> list[TokenLogprob]:
    normaliser = reductions.log_sum_exp(logits)
    target = torch.tensor(targets).to(logits.device)[:, None]
    value = logits.gather(1, target)
    ranks = ((logits > value).sum(-1) + 1).tolist()
    logprobs = (value.squeeze(1).double() - normaliser).tolist()
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(targets)
    if top:
        values, ids = reductions.k_largest(logits, top)
        listed = (values.double() - normaliser[:, None]).tolist()
        tops = [
            tuple((i, p) for i, p in zip(*row, strict=True) if p > -torch.inf)
            for row in zip(ids.tolist(), listed, strict=True)
        ]
    return [TokenLogprob(*fields) for fields in zip(targets, logprobs, ranks, tops, strict=True)]
