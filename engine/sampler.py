"""From logits to tokens, for all rows of an iteration at once. Owns the order of the steps and who takes part in each.

For every row, as in vLLM's sampler: logit_bias, allowed tokens, banned tokens, repetition penalty (prompt and output),
frequency and presence penalty (output), then the most probable token if greedy, else temperature, min_p, top_k, top_p,
each over what the one before left, and the draw. Logprobs are those of the raw logits, before all of it.

Equal logits rank by token id, lowest first, in every step. A row's token depends on its logits and its `SampleRow`
alone, never on the batch around it. Knows neither sequences nor scheduling nor text.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.batch import SampleRow, TokenLogprob
from engine.randomness import uniforms
from engine.sampling.draw import Rows, draw
from engine.sampling.edits import edit, is_edited
from engine.sampling.logprobs import token_logprobs
from engine.sampling.reductions import largest

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

    def sample(self, logits: Tensor, rows: SequenceOf[SampleRow]) -> Drawn:
        """Draws a token for `rows[i]` from `logits[i]`; logits is [R, V] float32 on any device and stays unchanged.

        A row that cannot be drawn from (NaN or +inf among its logits, or no token left) is named in `failed`.
        """
        assert len(logits) == len(rows), f"{len(logits)} rows of logits for {len(rows)} sample rows"
        if not rows:
            return Drawn([], [])
        best, ids = largest(logits)
        failed = _unusable(best.tolist(), _RAW_REASONS)
        token_ids = ids.tolist()
        # The arg max is every row's finite check and the greedy rows' answer; the others go on from here.
        others = [i for i, row in enumerate(rows) if i not in failed and (is_edited(row) or not row.params.greedy)]
        if others:
            chosen, reasons = _choose(_take(logits, others), [rows[i] for i in others], best[others])
            for i, token_id in zip(others, chosen, strict=True):
                token_ids[i] = token_id
            failed |= {others[j]: reason for j, reason in reasons.items()}
        for i in failed:
            token_ids[i] = 0
        return Drawn(token_ids, _logprobs(logits, rows, token_ids, failed), failed)


def _choose(logits: Tensor, rows: SequenceOf[SampleRow], best: Tensor) -> tuple[list[int], dict[int, str]]:
    """Tokens of rows that are edited or random, and which of them have no token to draw. `best` is [R], the maxima."""
    ids = torch.zeros(len(rows), dtype=torch.int64, device=logits.device)
    failed: dict[int, str] = {}
    edited = [i for i, row in enumerate(rows) if is_edited(row)]
    if edited:
        changed = logits[edited]
        edit(changed, [rows[i] for i in edited])
        logits = _put(logits, edited, changed)
        values, tokens = largest(changed)
        best, ids = _put(best, edited, values), _put(ids, edited, tokens)
        failed = _unusable(best.tolist(), _EDITED_REASONS)
    random = [i for i, row in enumerate(rows) if not row.params.greedy and i not in failed]
    if random:
        chosen = [rows[i] for i in random]
        numbers = uniforms([r.seed for r in chosen], [r.sample_index for r in chosen], [r.position for r in chosen])
        uniform = torch.from_numpy(numbers).to(logits.device)
        ids[random] = draw(Rows.of(_take(logits, random), best[random], uniform, [r.params for r in chosen]))
    return ids.tolist(), failed


def _unusable(best: list[float], reasons: dict[str, str]) -> dict[int, str]:
    """Rows that nothing can be drawn from, told by their largest logit: NaN and +inf win every comparison."""
    return {i: reasons[str(value)] for i, value in enumerate(best) if not -torch.inf < value < torch.inf}


def _take(logits: Tensor, rows: list[int]) -> Tensor:
    """The named rows, in order; the tensor itself when they are all of it."""
    return logits if len(rows) == len(logits) else logits[rows]


def _put(x: Tensor, rows: list[int], changed: Tensor) -> Tensor:
    """A copy of `x` with `changed` as the named rows; `changed` itself when they are all of it."""
    return changed if len(rows) == len(x) else x.index_copy(0, torch.tensor(rows, device=x.device), changed)


def _logprobs(
    logits: Tensor, rows: SequenceOf[SampleRow], token_ids: list[int], failed: dict[int, str]
) -> list[TokenLogprob | None]:
    found: list[TokenLogprob | None] = [None] * len(rows)
    tops = {i: row.params.logprobs for i, row in enumerate(rows) if i not in failed}
    asking = {i: top for i, top in tops.items() if top is not None}
    if asking:
        wanted = list(asking)
        entries = token_logprobs(_take(logits, wanted), [token_ids[i] for i in wanted], max(asking.values()))
        for i, entry in zip(wanted, entries, strict=True):
            found[i] = TokenLogprob(entry.token_id, entry.logprob, entry.rank, entry.top[: asking[i]])
    return found
