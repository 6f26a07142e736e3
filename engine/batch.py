"""What one iteration runs and what comes back. Plain, picklable values; no device tensor and no policy.

A batch is one flat token axis of prompt chunks and single decode tokens: T tokens of S sequences. Only attention looks
at the boundaries between sequences (selective batching, Orca, OSDI'22 section 3.2).
"""

from collections import Counter
from collections.abc import Collection, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.sampling_params import SamplingParams

SETTINGS = np.dtype(
    [
        ("seed", np.uint64),
        ("sample_index", np.int64),
        ("temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
    ]
)
"""How a token is drawn from its logits, one record a row; `SamplingParams` says what the numbers mean."""

_NO_TOKENS: NDArray[np.int64] = np.empty(0, np.int64)
_NO_NUMBERS: NDArray[np.float32] = np.empty(0, np.float32)


class Edit(NamedTuple):
    """How the logits of one row are changed before a token is chosen. The ids in one array differ from each other."""

    bias_ids: NDArray[np.int64] = _NO_TOKENS
    bias: NDArray[np.float32] = _NO_NUMBERS
    """Parallel to `bias_ids`: what is added."""
    allowed: NDArray[np.int64] | None = None
    """When given, no other token can be drawn."""
    banned: NDArray[np.int64] = _NO_TOKENS
    """Tokens that cannot be drawn."""
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seen: NDArray[np.int64] = _NO_TOKENS
    """Tokens of prompt and output; given only when there is a penalty."""
    counts: NDArray[np.float32] = _NO_NUMBERS
    """Parallel to `seen`: how often in the output."""

    @property
    def changes(self) -> bool:
        """Whether there is anything to change."""
        return bool(len(self.bias_ids) or self.allowed is not None or len(self.banned) or len(self.seen))


class SampleRow(NamedTuple):
    """One token to draw, from the logits of the last token that a sequence has in the batch, in the request's words."""

    row: int
    """Which of the batch's S sequences."""
    params: SamplingParams
    seed: int
    sample_index: int
    position: int
    """Index in the sequence (prompt included) of the token to draw. It fixes the randomness, with the two above."""
    banned: SequenceOf[int] = ()
    """Tokens that may not be drawn here."""
    prompt: SequenceOf[int] = ()
    output: SequenceOf[int] = ()
    """Tokens so far; prompt and output are read only when `params.needs_history`."""


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """R tokens to draw, as columns: hundreds of rows differ in a few numbers."""

    rows: NDArray[np.int64]
    """[R] which of the batch's S sequences; the logits are those of its last token in the batch."""
    positions: NDArray[np.int64]
    """[R] index in the sequence (prompt included) of the token to draw; it fixes the randomness, with the seed."""
    settings: NDArray[np.void]
    """[R] of SETTINGS."""
    edits: Mapping[int, Edit] = field(default_factory=dict)
    """Index into the rows -> how its logits are changed first."""
    logprobs: Mapping[int, int] = field(default_factory=dict)
    """Index into the rows -> how many of the most probable tokens to report beside the drawn one's logprob."""

    @classmethod
    def of(cls, rows: SequenceOf[SampleRow]) -> "Samples":
        """The columns of single rows."""
        edits = {index: edit_of(row.params, row.banned, row.prompt, row.output) for index, row in enumerate(rows)}
        return cls(
            rows=np.array([row.row for row in rows], np.int64),
            positions=np.array([row.position for row in rows], np.int64),
            settings=np.array([settings_of(row.params, row.seed, row.sample_index) for row in rows], SETTINGS),
            edits={index: edit for index, edit in edits.items() if edit.changes},
            logprobs={index: row.params.logprobs for index, row in enumerate(rows) if row.params.logprobs is not None},
        )

    def __len__(self) -> int:
        return len(self.rows)


def settings_of(params: SamplingParams, seed: int, sample_index: int) -> tuple[int, int, float, int, float, float]:
    """A record of SETTINGS. Seeds count modulo 2**64."""
    # A top_k beyond any vocabulary is as good as a larger one, which might not fit an integer.
    return seed % 2**64, sample_index, params.temperature, min(params.top_k, 2**31), params.top_p, params.min_p


def edit_of(
    params: SamplingParams,
    banned: Collection[int] = (),
    prompt: SequenceOf[int] = (),
    output: SequenceOf[int] = (),
) -> Edit:
    """What a request asks to be done to its logits after these tokens."""
    bias, allowed, counts = params.logit_bias or {}, params.allowed_token_ids, Counter[int]()
    if params.needs_history:
        counts.update(dict.fromkeys(prompt, 0))
        counts.update(output)
    return Edit(
        bias_ids=np.fromiter(bias.keys(), np.int64, len(bias)),
        bias=np.fromiter(bias.values(), np.float32, len(bias)),
        allowed=None if allowed is None else np.unique(np.array(allowed, np.int64)),
        banned=np.unique(np.fromiter(banned, np.int64, len(banned))),
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        seen=np.fromiter(counts.keys(), np.int64, len(counts)),
        counts=np.fromiter(counts.values(), np.float32, len(counts)),
    )


@dataclass(frozen=True, slots=True)
class PromptLogprobRow:
    """Prompt tokens of a sequence whose logprobs are wanted from this batch's logits."""

    row: int
    targets: tuple[int, ...]
    """`targets[i]` is the token that follows the sequence's i-th token in this batch; shorter than the chunk when the
    chunk reaches the prompt's end."""
    top: int
    """How many of the most probable tokens to report beside each target."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One iteration over S sequences and T tokens. Array names and meaning follow `varlen_attn`."""

    step: int
    sequence_ids: tuple[int, ...]
    token_ids: NDArray[np.int64]
    """[T] the tokens to run, sequence after sequence."""
    positions: NDArray[np.int64]
    """[T] index of each token in its own sequence."""
    cu_seq_q: NDArray[np.int32]
    """[S + 1] where each sequence's tokens begin on the flat axis."""
    context_lens: NDArray[np.int32]
    """[S] keys each sequence attends to, its tokens in this batch included."""
    page_table: NDArray[np.int32]
    """[S, P] page of each `page_tokens` positions; unused entries are 0 and never read."""
    samples: Samples
    prompt_logprobs: tuple[PromptLogprobRow, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_ids)


class TokenLogprob(NamedTuple):
    """Natural-log probability of one token, and of the most probable ones beside it."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most probable token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), most probable first."""


@dataclass(frozen=True, slots=True)
class StepStats:
    """What an iteration cost."""

    num_tokens: int
    num_sequences: int
    seconds: float
    """Wall time from batch to drawn tokens."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What an iteration brought back; lists are parallel to `Batch.samples` and `Batch.prompt_logprobs`."""

    step: int
    token_ids: list[int]
    """The token drawn for each sample row; meaningless for a row in `failed`."""
    logprobs: list[TokenLogprob | None]
    prompt_logprobs: list[tuple[TokenLogprob, ...]]
    stats: StepStats
    failed: dict[int, str] = field(default_factory=dict)
    """Sample rows whose logits could not be sampled from (not finite, say), with the reason: they fail alone."""
