"""With several batches in flight, each has its part of the sequences, and the parts are alike."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch
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


@settings(deadline=None)
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
