"""Batches gathered from columns are those that a walk over the sequences would lay out, and they keep."""

import copy
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
from engine.config import SchedulerConfig
from engine.engine import Engine
from engine.kv.pages import PagePool
from engine.lanes import Lanes
from engine.limits import Limits
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Order, Request, Sequence
from tests.engine.fakes import VOCAB, LedgerRunner, PipelinedExecutor, run_to_end
from tests.engine.plain_batch import assert_same, plain_batch

PAGE_TOKENS = 2
STOP = 7


class CheckedScheduler(Scheduler):
    """Compares every batch with the oracle's, and keeps a copy of it as it was when it was made."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches: list[tuple[Batch, Batch]] = []

    def plan(self) -> Batch | None:
        batch = super().plan()
        if batch is not None:
            sequences = self._in_flight[-1].sequences
            counts = (batch.cu_seq_q[1:] - batch.cu_seq_q[:-1]).tolist()
            # What a batch runs counts as computed from here on.
            spans = [(s, s.num_computed - count, s.num_computed) for s, count in zip(sequences, counts, strict=True)]
            assert_same(batch, plain_batch(batch.step, spans, PAGE_TOKENS))
            self.batches.append((batch, copy.deepcopy(batch)))
        return batch


def engine_of(num_pages: int, max_sequences: int, max_batch_tokens: int, depth: int = 1) -> tuple[Engine, Any]:
    config = SchedulerConfig(max_sequences=max_sequences, max_batch_tokens=max(max_batch_tokens, max_sequences))
    scheduler = CheckedScheduler(config, PagePool(num_pages), PAGE_TOKENS)
    executor = PipelinedExecutor(LedgerRunner(num_pages, PAGE_TOKENS), depth)
    return Engine(scheduler, executor, Limits(num_pages * PAGE_TOKENS, VOCAB)), scheduler


token = st.integers(0, VOCAB - 1)
params = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 12), "seed": st.integers(-(2**63), 2**64 - 1), "n": st.integers(1, 3)},
    optional={
        "temperature": st.sampled_from([0.0, 0.7]),
        "top_k": st.sampled_from([5, 2**80]),
        "top_p": st.just(0.5),
        "min_p": st.just(0.1),
        "min_tokens": st.just(1),
        "stop_token_ids": st.just((STOP, 3)),
        "repetition_penalty": st.just(1.2),
        "frequency_penalty": st.just(0.5),
        "presence_penalty": st.just(-0.5),
        "logit_bias": st.dictionaries(token, st.floats(-100, 100), max_size=3),
        "allowed_token_ids": st.lists(token, min_size=1, max_size=4).map(tuple),
        "logprobs": st.integers(0, 3),
        "prompt_logprobs": st.integers(0, 3),
    },
)
arrivals = st.lists(
    st.tuples(st.lists(token, min_size=1, max_size=12), params, st.integers(0, 3), st.integers(0, 8)),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150)
@given(
    arrivals=arrivals,
    num_pages=st.integers(13, 60),
    max_sequences=st.integers(1, 20),
    max_batch_tokens=st.integers(1, 24),
    depth=st.integers(1, 3),
)
def test_every_batch_is_the_one_laid_out_sequence_by_sequence(
    arrivals: list, num_pages: int, max_sequences: int, max_batch_tokens: int, depth: int
) -> None:
    engine, scheduler = engine_of(num_pages, max_sequences, max_batch_tokens, depth)
    for number, (prompt, wishes, gap, abort_after) in enumerate(arrivals):
        engine.add(Request(str(number), tuple(prompt), SamplingParams(**wishes)))
        for _ in range(gap):
            engine.step()
        if abort_after == 0:
            engine.abort(str(number // 2))
    run_to_end(engine)
    for batch, as_made in scheduler.batches:
        assert_same(batch, as_made)


def test_more_sequences_and_longer_ones_than_there_was_room_for_at_first() -> None:
    engine, scheduler = engine_of(num_pages=1000, max_sequences=40, max_batch_tokens=100)
    for number in range(40):
        engine.add(Request(str(number), (number, 1), SamplingParams(max_tokens=1 + number, temperature=0.0)))
    run_to_end(engine)
    assert max(batch.num_sequences for batch, _ in scheduler.batches) == 40
    assert max(batch.page_table.shape[1] for batch, _ in scheduler.batches) > 16


def test_sequences_that_were_preempted_are_found_in_their_new_lanes() -> None:
    lanes, params = Lanes(PAGE_TOKENS), SamplingParams()
    sequences = [
        Sequence(number, Request(str(number), (number,), params), Order(0, number, 0), 0, frozenset(), 4, [number])
        for number in range(2)
    ]
    for _ in range(2):
        for sequence in sequences:
            lanes.enter(sequence)
        group = lanes.group(sequences)
        assert lanes.last_token[group.lanes].tolist() == [0, 1]
        assert lanes.group(list(sequences)) is group
        for sequence in sequences:
            lanes.leave(sequence)


@pytest.mark.parametrize("wishes", [{}, {"repetition_penalty": 1.5, "logprobs": 2, "prompt_logprobs": 1}])
def test_batches_cross_processes(wishes: dict[str, Any]) -> None:
    engine, scheduler = engine_of(num_pages=50, max_sequences=4, max_batch_tokens=8)
    engine.add(Request("r", (1, 2, 3), SamplingParams(max_tokens=3, **wishes)))
    run_to_end(engine)
    for batch, _ in scheduler.batches:
        assert_same(pickle.loads(pickle.dumps(batch)), batch)
