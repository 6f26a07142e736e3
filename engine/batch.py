"""What one iteration runs and what comes back. Plain, picklable values; no device tensor and no policy.

A batch is one flat token axis of prompt chunks and single decode tokens: T tokens of S sequences. Only attention looks
at the boundaries between sequences (selective batching, Orca, OSDI'22 section 3.2).
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One token to draw, from the logits of the last token that a sequence has in the batch."""

    row: int
    """Which of the batch's S sequences."""
    params: SamplingParams
    seed: int
    sample_index: int
    position: int
    """Index in the sequence (prompt included) of the token to draw. It fixes the randomness, with the two above."""
    banned: tuple[int, ...] = ()
    """Tokens that may not be drawn here."""
    prompt: SequenceOf[int] = ()
    """Prompt tokens, given only when `params.needs_history`."""
    output: SequenceOf[int] = ()
    """Output tokens so far, given only when `params.needs_history`."""


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
    samples: tuple[SampleRow, ...]
    prompt_logprobs: tuple[PromptLogprobRow, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_ids)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
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
