"""What comes of an iteration for those who wait for it: emissions, of sequences and what was drawn. Decides nothing."""

from typing import Any

from engine.batch import StepOutput, TokenLogprob
from engine.batching import Layout
from engine.sequence import Emission, FinishReason, Sequence


def emission(sequence: Sequence, **what: Any) -> Emission:
    return Emission(sequence.request.request_id, sequence.sample_index, **what)


def drawn(
    sequence: Sequence,
    token_id: int,
    logprob: TokenLogprob | None,
    *,
    scored: tuple[TokenLogprob, ...],
    finish_reason: FinishReason | None,
    cached_tokens: int,
) -> Emission:
    """A token with all that goes with it."""
    return emission(
        sequence,
        token_ids=(token_id,),
        logprobs=() if logprob is None else (logprob,),
        prompt_logprobs=scored,
        finish_reason=finish_reason,
        stop_token_id=token_id if finish_reason is FinishReason.STOP else None,
        cached_tokens=cached_tokens,
    )


def newly_scored(layout: Layout, output: StepOutput) -> dict[int, tuple[TokenLogprob, ...]]:
    """Sequence id -> prompt logprobs that were not reported before a preemption; marks them as reported."""
    scored = {}
    for row, found in zip(layout.batch.prompt_logprobs, output.prompt_logprobs, strict=True):
        sequence = layout.sequences[row.row]
        first = int(layout.batch.positions[layout.batch.cu_seq_q[row.row]])
        fresh = found[max(0, sequence.num_scored - first) :]
        sequence.num_scored += len(fresh)
        scored[sequence.sequence_id] = fresh
    return scored
