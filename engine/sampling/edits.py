"""Edits of logits that move the most probable token: bias, allowed and banned tokens, penalties.

Every edit touches only the (row, token) pairs that it names, whatever the vocabulary. Knows neither temperature nor
randomness.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import SampleRow

_FLOAT32 = torch.finfo(torch.float32)


def is_edited(row: SampleRow) -> bool:
    """Whether `edit` would change the row's logits."""
    params = row.params
    return bool(row.banned or params.logit_bias or params.allowed_token_ids is not None or params.needs_history)


def edit(logits: Tensor, rows: SequenceOf[SampleRow]) -> None:
    """Edits [R, V] float32 logits in place, in the order logit_bias, allowed, banned, repetition, frequency, presence.

    Token ids that are not in the vocabulary are skipped: there is nothing of theirs to change.
    """
    _add_bias(logits, rows)
    _keep_allowed(logits, rows)
    _drop_banned(logits, rows)
    _penalise_repetition(logits, rows)
    _penalise_output(logits, rows)


def _add_bias(logits: Tensor, rows: SequenceOf[SampleRow]) -> None:
    biases = [row.params.logit_bias or {} for row in rows]
    if not any(biases):
        return
    # A row's biases are a mapping, so no pair occurs twice and a plain read-add-write is right.
    pairs, known = _pairs(biases, logits)
    bias = np.fromiter(chain.from_iterable(b.values() for b in biases), dtype=np.float32)[known]
    logits.view(-1)[pairs] += torch.from_numpy(bias).to(logits.device)


def _keep_allowed(logits: Tensor, rows: SequenceOf[SampleRow]) -> None:
    limited = [i for i, row in enumerate(rows) if row.params.allowed_token_ids is not None]
    if not limited:
        return
    pairs, _ = _pairs([row.params.allowed_token_ids or () for row in rows], logits)
    flat = logits.view(-1)
    kept = flat[pairs]
    logits.index_fill_(0, torch.tensor(limited, device=logits.device), -torch.inf)
    flat[pairs] = kept


def _drop_banned(logits: Tensor, rows: SequenceOf[SampleRow]) -> None:
    if any(row.banned for row in rows):
        logits.view(-1)[_pairs([row.banned for row in rows], logits)[0]] = -torch.inf


def _penalise_repetition(logits: Tensor, rows: SequenceOf[SampleRow]) -> None:
    """CTRL (Keskar et al., 2019, section 4.1), with the sign rule that keeps it a penalty for negative logits."""
    penalised = [row.params.repetition_penalty != 1.0 for row in rows]
    if not any(penalised):
        return
    histories = [chain(row.prompt, row.output) if on else () for row, on in zip(rows, penalised, strict=True)]
    pairs, _ = _pairs(histories, logits)
    penalty = _of_pairs(rows, lambda row: row.params.repetition_penalty, pairs, logits)
    flat = logits.view(-1)
    # A repeated pair reads the same value and writes the same result: no need to count.
    seen = flat[pairs]
    flat[pairs] = torch.where(seen > 0, seen / penalty, seen * penalty)


def _penalise_output(logits: Tensor, rows: SequenceOf[SampleRow]) -> None:
    penalised = [row.params.presence_penalty != 0.0 or row.params.frequency_penalty != 0.0 for row in rows]
    if not any(penalised):
        return
    pairs, _ = _pairs([row.output if on else () for row, on in zip(rows, penalised, strict=True)], logits)
    flat = logits.view(-1)
    counts = torch.zeros_like(flat).scatter_add_(0, pairs, flat.new_ones(len(pairs)))[pairs]
    frequency = _of_pairs(rows, lambda row: row.params.frequency_penalty, pairs, logits)
    presence = _of_pairs(rows, lambda row: row.params.presence_penalty, pairs, logits)
    flat[pairs] = flat[pairs] - frequency * counts - presence


def _pairs(tokens: SequenceOf[Iterable[int]], logits: Tensor) -> tuple[Tensor, NDArray[np.bool_]]:
    """Flat indices into [R, V] of each row's tokens, and which of all the tokens are in the vocabulary."""
    vocabulary = logits.shape[1]
    per_row = [np.fromiter(row, dtype=np.int64) for row in tokens]
    ids = np.concatenate(per_row)
    rows = np.repeat(np.arange(len(per_row)), [len(row) for row in per_row])
    known = ids < vocabulary
    return torch.from_numpy((rows * vocabulary + ids)[known]).to(logits.device), known


def _of_pairs(
    rows: SequenceOf[SampleRow], value: Callable[[SampleRow], float], pairs: Tensor, logits: Tensor
) -> Tensor:
    """A number of each row, clipped to what float32 holds, spread over the row's pairs."""
    per_row = torch.tensor([value(row) for row in rows], dtype=torch.float64).clamp(-_FLOAT32.max, _FLOAT32.max)
    return per_row.to(logits)[pairs // logits.shape[1]]
