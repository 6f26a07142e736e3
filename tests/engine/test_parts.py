"""With several batches in flight, each has its part of the sequences, and the parts are alike."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.batch import Batch
from engine.pace import Pace
from engine.policy import LEAST_CHUNK
from tests.engine.fakes import run_to_end
from tests.engine.rig import Rig, expected, request


def decodes(batches: list[Batch]) -> Iterator[int]:
    """Sequences of each batch that runs nothing but one token of each."""
    return (batch.num_sequences for batch in batches if batch.num_tokens == batch.num_sequences)


@pytest.mark.parametrize(("depth", "streams", "parts"), [(2, 8, {4}), (2, 5, {2, 3}), (4, 8, {2}), (4, 3, {1})])
def test_decodes_make_exactly_as_many_batches_as_are_in_flight(depth: int, streams: int, parts: set[int]) -> None:
    rig = Rig(num_pages=200, page_tokens=4, max_sequences=16, max_batch_tokens=64, depth=depth)
    for index in range(streams):
        rig.engine.add(request(str(index), [index, 1, 2], max_tokens=40))
    for _ in range(depth * 4):  # until all have their first token
        rig.step()
    before = len(rig.runner.batches)
    for _ in range(depth * 10):
        rig.step()
    assert set(decodes(rig.runner.batches[before:])) == parts
    # All stages have work whenever there is enough for all.
    assert len(rig.scheduler._in_flight) == min(depth, streams) - 1
    run_to_end(rig.engine, rig.streams)
    rig.check_nothing_left()


def test_long_prompts_are_run_by_turns_rather_than_one_behind_the_other() -> None:
    rig = Rig(num_pages=1000, page_tokens=4, max_batch_tokens=1024, depth=2)
    for name in "ab":
        rig.engine.add(request(name, list(range(90)) * 8, max_tokens=2))
    rig.step()
    assert [batch.num_tokens for batch in rig.runner.batches] == [720, 720]


def test_a_lone_prompt_takes_the_whole_budget() -> None:
    rig = Rig(num_pages=1000, page_tokens=4, max_batch_tokens=512, depth=2)
    rig.engine.add(request("a", list(range(90)) * 8, max_tokens=1))
    run_to_end(rig.engine, rig.streams)
    assert [batch.num_tokens for batch in rig.runner.batches] == [512, 208]


def test_only_the_first_prompt_of_a_batch_is_cut() -> None:
    rig = Rig(num_pages=1000, page_tokens=4, max_batch_tokens=400, depth=2)
    for name in "abc":
        rig.engine.add(request(name, list(range(50)) * 5, max_tokens=1))
    rig.step()
    first, second = rig.runner.batches
    assert first.sequence_ids != second.sequence_ids
    assert [first.num_tokens, second.num_tokens] == [250, 250]


def rig_with_streams() -> Rig:
    """32 streams that all decode, in batches of 16."""
    rig = Rig(num_pages=2000, page_tokens=4, max_sequences=40, max_batch_tokens=1024, depth=2, token_seconds=0.005)
    for index in range(32):
        rig.engine.add(request(str(index), [index, 1, 2], max_tokens=100))
    while rig.scheduler.waiting or any(sequence.num_remaining > 1 for sequence in rig.scheduler.running):
        rig.step()
    return rig


def test_a_prompt_that_comes_to_streams_is_spread_over_their_batches() -> None:
    """So that no stage waits for one long batch; without streams, or one batch at a time, it runs at once."""
    rig = rig_with_streams()
    before = len(rig.runner.batches)
    rig.engine.add(request("long", [7] * 600, max_tokens=1))
    while "long" in rig.scheduler._sequences:
        rig.step()
    sizes = [batch.num_tokens for batch in rig.runner.batches[before:]]
    # A sixteenth of what is left of it each time, and not less than is worth the while; every other batch is without.
    assert max(sizes) == 16 + -(-600 // 16)
    chunks = [size - 16 for size in sizes if size > 17]
    assert sum(chunks) == 600 and min(chunks[:-1]) == 32
    run_to_end(rig.engine, rig.streams)
    rig.check_nothing_left()


def test_what_one_prompt_leaves_of_a_batch_of_decodes_another_takes() -> None:
    """So that batches that follow each other are alike: a stage waits for the difference."""
    rig = rig_with_streams()
    before = len(rig.runner.batches)
    for index in range(5):
        rig.engine.add(request(f"prompt {index}", [index] * 70, max_tokens=50))
    while rig.scheduler.waiting or any(sequence.num_remaining > 32 for sequence in rig.scheduler.running):
        rig.step()
    prompts = [batch.num_tokens - batch.num_sequences for batch in rig.runner.batches[before:]]
    assert len(prompts) >= 8
    # 32 tokens of one or two prompts.
    assert set(prompts[:8]) <= {30, 31}
    run_to_end(rig.engine, rig.streams)
    rig.check_nothing_left()


def test_what_is_quick_is_not_cut_short() -> None:
    pace = Pace(0.25)
    assert pace.least_tokens() == LEAST_CHUNK
    for _ in range(20):
        pace.observe(1000, 0.05)
    assert pace.least_tokens() == pytest.approx(400, abs=1)


@given(
    prompts=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    depth=st.integers(1, 5),
    budget=st.integers(8, 40),
    pages=st.integers(40, 80),
)
def test_tokens_do_not_depend_on_how_many_batches_are_in_flight(
    prompts: list[int], depth: int, budget: int, pages: int
) -> None:
    rig = Rig(num_pages=pages, page_tokens=2, max_batch_tokens=budget, depth=depth)
    for index, length in enumerate(prompts):
        rig.engine.add(request(str(index), [index] * length, max_tokens=7))
    while rig.engine.has_work():
        rig.step()
    for index, length in enumerate(prompts):
        assert rig.streams.tokens[str(index), 0] == expected([index] * length, 7)
    rig.check_nothing_left()
