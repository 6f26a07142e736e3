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
        assert logits.shape[0] == len(samples), f"{logits.shape[0]} rows of logits for {len(samples)} to draw from"
        if not len(samples):
            return Drawn([], [])
        # The arg max is every row's finite check and the greedy rows' answer; the others go on from here.
        best, token_ids = self.largest(logits)
        failed = unusable(best)
        if samples.edits or np.count_nonzero(samples.settings["temperature"]):
            self._draw_others(logits, samples, best, token_ids, failed)
        for i in failed:
            token_ids[i] = 0
        return Drawn(token_ids, self._logprobs(logits, samples, token_ids, failed), failed)

    def largest(self, logits: Tensor) -> tuple[list[float], list[int]]:
        """See `engine.sampling.reductions.largest`."""
        return self._reductions.largest(logits)

    def k_largest(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `engine.sampling.reductions.k_largest`."""
        return self._reductions.k_largest(logits, k)

    @torch.inference_mode()
    def token_logprobs(self, logits: Tensor, targets: SequenceOf[int], top: int) -> tuple[TokenLogprob, ...]:
        """See `engine.sampling.logprobs.token_logprobs`."""
        return token_logprobs(logits, targets, top, self._reductions)

    @torch.inference_mode()
    def _draw_others(
        self, logits: Tensor, samples: Samples, best: list[float], token_ids: list[int], failed: dict[int, str]
    ) -> None:
        """Puts the tokens of edited and random rows, which have those of greedy ones, into `token_ids` and `failed`."""
        rows = {*np.flatnonzero(samples.settings["temperature"]).tolist(), *samples.edits}
        others = sorted(rows - failed.keys())
        chosen, reasons = self._choose(
            take_logits(logits, others), take_rows(samples, others), [best[i] for i in others]
        )
        for i, token_id in zip(others, chosen, strict=True):
            token_ids[i] = token_id
        failed |= {others[j]: reason for j, reason in reasons.items()}

    def _choose(self, logits: Tensor, samples: Samples, best: list[float]) -> tuple[list[int], dict[int, str]]:
        """Tokens of rows that are edited or random, and which have no token to draw. `best` are the R maxima."""
        ids = [0] * len(samples)
        failed: dict[int, str] = {}
        if samples.edits:
            edited = list(samples.edits)
            changed = logits[edited]
            edit(changed, list(samples.edits.values()))
            logits, best = _put(logits, edited, changed), best.copy()
            for i, value, token_id in zip(edited, *self._reductions.largest(changed), strict=True):
                best[i], ids[i] = value, token_id
            failed = unusable(best, _EDITED_REASONS)
        random = [i for i in np.flatnonzero(samples.settings["temperature"]).tolist() if i not in failed]
        if random:
            settings = samples.settings[random]
            numbers = uniforms(
                settings["seed"].tolist(), settings["sample_index"].tolist(), samples.positions[random].tolist()
            )
            uniform = torch.from_numpy(numbers).to(logits.device)
            maxima = torch.tensor([best[i] for i in random], dtype=torch.float32, device=logits.device)
            rows = Rows.of(take_logits(logits, random), maxima, uniform, settings)
            for i, token_id in zip(random, draw(rows, self._reductions).tolist(), strict=True):
                ids[i] = token_id
        return ids, failed

    def _logprobs(
        self, logits: Tensor, samples: Samples, token_ids: list[int], failed: dict[int, str]
    ) -> list[TokenLogprob | None]:
        found: list[TokenLogprob | None] = [None] * len(samples)
        asking = {i: top for i, top in samples.logprobs.items() if i not in failed}
        if asking:
            wanted = list(asking)
            targets = [token_ids[i] for i in wanted]
            entries = self.token_logprobs(take_logits(logits, wanted), targets, max(asking.values()))
            for i, entry in zip(wanted, entries, strict=True):
                found[i] = entry._replace(top=entry.top[: asking[i]])
        return found


def unusable(best: list[float], reasons: dict[str, str] = _RAW_REASONS) -> dict[int, str]:
    """Rows that nothing can be drawn from, told by their largest logit: NaN and +inf win every comparison."""
    if math.isfinite(sum(best)):
        return {}
    return {i: reasons[str(value)] for i, value in enumerate(best) if not math.isfinite(value)}


def take_logits(x: Tensor, rows: list[int]) -> Tensor:
    """The named rows, in rising order; the tensor itself when they are all of it."""
    return x if len(rows) == len(x) else x[rows]


def take_rows(samples: Samples, rows: list[int]) -> Samples:
    """The named rows, in rising order."""
    if len(rows) == len(samples):
        return samples
    edits = {place: samples.edits[row] for place, row in enumerate(rows) if row in samples.edits}
    logprobs = {place: samples.logprobs[row] for place, row in enumerate(rows) if row in samples.logprobs}
    return Samples(samples.rows[rows], samples.positions[rows], samples.settings[rows], edits, logprobs)


def _put(x: Tensor, rows: list[int], changed: Tensor) -> Tensor:
    """A copy of `x` with `changed` as the named rows; `changed` itself when they are all of it."""
    return changed if len(rows) == len(x) else x.index_copy(0, torch.tensor(rows, device=x.device), changed)
