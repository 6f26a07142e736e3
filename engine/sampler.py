"""From logits to tokens, for all rows of an iteration at once. Owns the order of the steps and who takes part in each.

For every row, as in vLLM's sampler: logit_bias, allowed tokens, banned tokens, repetition penalty (prompt and output),
frequency and presence penalty (output), then the most probable token if greedy, else temperature, min_p, top_k, top_p,
each over what the one before left, and the draw. Logprobs are those of the raw logits, before all of it.

Equal logits rank by token id, lowest first, in every step. A row's token depends on its logits and its own settings
alone, never on the batch around it. Knows neither sequences nor scheduling nor text.
"""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.batch import Samples, TokenLogprob
from engine.randomness import uniforms
from engine.sampling import reductions as torch_reductions
from engine.sampling.draw import Rows, draw
from engine.sampling.edits import edit
from engine.sampling.logprobs import token_logprobs
from engine.sampling.reductions import Reductions

__all__ = ["Drawn", "Sampler", "token_logprobs"]

_RAW_REASONS = {
    "nan": "the model's logits contain NaN",
    "inf": "the model's logits contain +inf",
    "-inf": "the model's logits are all -inf",
}
_EDITED_REASONS = {
    "nan": "a penalty made a logit NaN",
    "inf": "repetition_penalty is so small that it made a logit infinite",
    "-inf": "no token is left to draw: allowed_token_ids and banned tokens exclude them all",
}


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens of R sample rows; the lists are parallel to the rows."""

    token_ids: list[int]
    """0 for a row in `failed`."""
    logprobs: list[TokenLogprob | None]
    """None for rows that did not ask and for rows in `failed`."""
    failed: dict[int, str] = field(default_factory=dict)
    """Index into the rows -> why nothing could be drawn there."""


class Sampler:
    """Stateless: what a row needs travels with the row."""

    def __init__(self, reductions: Reductions = torch_reductions) -> None:
        self._reductions = reductions

    def sample(self, logits: Tensor, samples: Samples) -> Drawn:
        """Draws `samples` of R rows from `logits`, [R, V] float32 on any device; they stay unchanged.

        A row that cannot be drawn from (NaN or +inf among its logits, or no token left) is named in `failed`.
        """
        assert len(logits) == len(samples), f"{len(logits)} rows of logits for {len(samples)} to draw from"
        if not len(samples):
            return Drawn([], [])
        best, ids = self._reductions.largest(logits)
        failed = _unusable(best, _RAW_REASONS)
        token_ids = ids.tolist()
        # The arg max is every row's finite check and the greedy rows' answer; the others go on from here.
        random = samples.settings["temperature"] > 0.0
        if samples.edits or random.any():
            random[list(samples.edits)] = True
            others = [i for i in np.flatnonzero(random).tolist() if i not in failed]
            chosen, reasons = self._choose(_take(logits, others), _take_rows(samples, others), _take(best, others))
            for i, token_id in zip(others, chosen, strict=True):
                token_ids[i] = token_id
            failed |= {others[j]: reason for j, reason in reasons.items()}
        for i in failed:
            token_ids[i] = 0
        return Drawn(token_ids, self._logprobs(logits, samples, token_ids, failed), failed)

    def token_logprobs(self, logits: Tensor, targets: SequenceOf[int], top: int) -> tuple[TokenLogprob, ...]:
        """See `engine.sampling.logprobs.token_logprobs`."""
        return token_logprobs(logits, targets, top, self._reductions)

    def _choose(self, logits: Tensor, samples: Samples, best: Tensor) -> tuple[list[int], dict[int, str]]:
        """Tokens of rows that are edited or random, and which have no token to draw. `best` is [R], the maxima."""
        ids = torch.zeros(len(samples), dtype=torch.int64, device=logits.device)
        failed: dict[int, str] = {}
        if samples.edits:
            edited = list(samples.edits)
            changed = logits[edited]
            edit(changed, list(samples.edits.values()))
            logits = _put(logits, edited, changed)
            values, tokens = self._reductions.largest(changed)
            best, ids = _put(best, edited, values), _put(ids, edited, tokens)
            failed = _unusable(best, _EDITED_REASONS)
        random = [i for i in np.flatnonzero(samples.settings["temperature"]).tolist() if i not in failed]
        if random:
            settings = samples.settings[random]
            numbers = uniforms(
                settings["seed"].tolist(), settings["sample_index"].tolist(), samples.positions[random].tolist()
            )
            uniform = torch.from_numpy(numbers).to(logits.device)
            rows = Rows.of(_take(logits, random), _take(best, random), uniform, settings)
            ids[random] = draw(rows, self._reductions)
        return ids.tolist(), failed

    def _logprobs(
        self, logits: Tensor, samples: Samples, token_ids: list[int], failed: dict[int, str]
    ) -> list[TokenLogprob | None]:
        found: list[TokenLogprob | None] = [None] * len(samples)
        asking = {i: top for i, top in samples.logprobs.items() if i not in failed}
        if asking:
            wanted = list(asking)
            targets = [token_ids[i] for i in wanted]
            entries = self.token_logprobs(_take(logits, wanted), targets, max(asking.values()))
            for i, entry in zip(wanted, entries, strict=True):
                found[i] = entry._replace(top=entry.top[: asking[i]])
        return found


def _unusable(best: Tensor, reasons: dict[str, str]) -> dict[int, str]:
    """Rows that nothing can be drawn from, told by their largest logit: NaN and +inf win every comparison."""
    values = best.tolist()
    if math.isfinite(sum(values)):
        return {}
    return {i: reasons[str(value)] for i, value in enumerate(values) if not math.isfinite(value)}


def _take(x: Tensor, rows: list[int]) -> Tensor:
    """The named rows, in rising order; the tensor itself when they are all of it."""
    return x if len(rows) == len(x) else x[rows]


def _take_rows(samples: Samples, rows: list[int]) -> Samples:
    """What drawing the named rows, in rising order, takes."""
    if len(rows) == len(samples):
        return samples
    edits = {place: samples.edits[row] for place, row in enumerate(rows) if row in samples.edits}
    return Samples(samples.rows[rows], samples.positions[rows], samples.settings[rows], edits)


def _put(x: Tensor, rows: list[int], changed: Tensor) -> Tensor:
    """A copy of `x` with `changed` as the named rows; `changed` itself when they are all of it."""
    return changed if len(rows) == len(x) else x.index_copy(0, torch.tensor(rows, device=x.device), changed)
