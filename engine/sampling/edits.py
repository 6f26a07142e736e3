"""Edits of logits that move the most probable token: bias, allowed and banned tokens, penalties.

Every edit touches only the (row, token) pairs that it names, whatever the vocabulary. Knows neither temperature nor
randomness.
"""

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Edit

_FLOAT32 = torch.finfo(torch.float32)


def edit(logits: Tensor, edits: SequenceOf[Edit]) -> None:
    """Edits [R, V] float32 logits in place, in the order logit_bias, allowed, banned, repetition, frequency, presence.

    Token ids that are not in the vocabulary are skipped: there is nothing of theirs to change.
    """
    _add_bias(logits, edits)
    _keep_allowed(logits, edits)
    _drop_banned(logits, edits)
    _penalise(logits, edits)


def _add_bias(logits: Tensor, edits: SequenceOf[Edit]) -> None:
    rows = [row for row, each in enumerate(edits) if len(each.bias_ids)]
    if rows:
        # No pair occurs twice, so a plain read-add-write is right.
        pairs, known, _ = _pairs(rows, [edits[row].bias_ids for row in rows], logits)
        bias = np.concatenate([edits[row].bias for row in rows])[known]
        logits.view(-1)[pairs] += torch.from_numpy(bias).to(logits.device)


def _keep_allowed(logits: Tensor, edits: SequenceOf[Edit]) -> None:
    limited = {row: each.allowed for row, each in enumerate(edits) if each.allowed is not None}
    if limited:
        rows = list(limited)
        pairs, _, _ = _pairs(rows, list(limited.values()), logits)
        flat = logits.view(-1)
        kept = flat[pairs]
        logits.index_fill_(0, torch.tensor(rows, device=logits.device), -torch.inf)
        flat[pairs] = kept


def _drop_banned(logits: Tensor, edits: SequenceOf[Edit]) -> None:
    rows = [row for row, each in enumerate(edits) if len(each.banned)]
    if rows:
        logits.view(-1)[_pairs(rows, [edits[row].banned for row in rows], logits)[0]] = -torch.inf


def _penalise(logits: Tensor, edits: SequenceOf[Edit]) -> None:
    """Repetition by CTRL (Keskar et al., 2019, section 4.1), with the sign rule that keeps it a penalty for negative
    logits, over prompt and output; then frequency and presence over the output."""
    rows = [row for row, each in enumerate(edits) if len(each.seen)]
    if not rows:
        return
    penalised = [edits[row] for row in rows]
    pairs, known, lengths = _pairs(rows, [each.seen for each in penalised], logits)
    count = torch.from_numpy(np.concatenate([each.counts for each in penalised])[known]).to(logits.device)

    def spread(values: list[float]) -> Tensor:
        """A number of each row, over the row's pairs."""
        return torch.from_numpy(np.repeat(np.array(values, np.float32), lengths)[known]).to(logits.device)

    flat = logits.view(-1)
    values = flat.index_select(0, pairs)
    if any(each.repetition_penalty != 1.0 for each in penalised):
        # Outside float32's normal range a penalty would become 0 or inf, and a logit of 0 NaN.
        penalties = [min(max(each.repetition_penalty, _FLOAT32.tiny), _FLOAT32.max) for each in penalised]
        penalty, positive = spread(penalties), values.relu()
        # One of the two terms is 0: far quicker than choosing between them token by token.
        values = positive / penalty + (values - positive) * penalty
    if any(each.frequency_penalty for each in penalised):
        values -= spread([each.frequency_penalty for each in penalised]) * count
    if any(each.presence_penalty for each in penalised):
        values -= spread([each.presence_penalty for each in penalised]) * (count > 0)
    flat.scatter_(0, pairs, values)


def _pairs(
    rows: SequenceOf[int], tokens: SequenceOf[NDArray[np.int64]], logits: Tensor
) -> tuple[Tensor, NDArray[np.bool_] | slice, list[int]]:
    """Flat indices into [R, V] of the rows' tokens; which tokens are in the vocabulary; how many tokens a row has."""
    vocabulary, lengths = logits.shape[1], [len(each) for each in tokens]
    ids = np.concatenate(tokens)
    known = ids < vocabulary
    pairs = np.repeat(np.array(rows, np.int64) * vocabulary, lengths) + ids
    which = slice(None) if known.all() else known
    return torch.from_numpy(pairs[which]).to(logits.device), which, lengths
