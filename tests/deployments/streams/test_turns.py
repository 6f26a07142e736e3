"""The order of choices depends on their tokens alone."""

from hypothesis import given
from hypothesis import strategies as st

from deployments.streams.turns import Turns, steps_of
from engine.batch import TokenLogprob
from engine.sequence import Emission, FinishReason


def taken(turns: Turns, lengths: list[int], order: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Feeds choices of those lengths in an order of arrival; what came out, and how much was out after each arrival."""
    out: list[tuple[int, int]] = []
    after: list[int] = []
    arrived = [0] * len(lengths)
    for choice in order:
        turns.put(choice, Emission("", 0, (arrived[choice],)))
        arrived[choice] += 1
        while (step := turns.take()) is not None:
            out.append((step[0], step[1].token_ids[0]))
            if step[1].token_ids[0] == lengths[step[0]] - 1:
                turns.finish(step[0])
        after.append(len(out))
    return out, after


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=9))
    # A choice may bring tokens after its end: those that were drawn before the engine heard of a stop string.
    all_of_them = [choice for choice, length in enumerate(lengths) for _ in range(length + draw(st.integers(0, 2)))]
    return lengths, draw(st.permutations(all_of_them)), draw(st.integers(1, 5))


@given(arrivals())
def test_every_token_comes_once_and_in_an_order_that_no_arrival_changes(
    example: tuple[list[int], list[int], int],
) -> None:
    lengths, order, group = example
    out, _ = taken(Turns(len(lengths), group), lengths, order)
    wanted = []
    for begin in range(0, len(lengths), group):
        members = range(begin, min(begin + group, len(lengths)))
        wanted += [(c, p) for p in range(max(lengths)) for c in members if p < lengths[c]]
    assert out == wanted


def test_a_single_choice_waits_for_nobody() -> None:
    _, after = taken(Turns(1), [5], [0] * 5)
    assert after == [1, 2, 3, 4, 5]


def test_choices_that_advance_together_wait_for_nobody() -> None:
    _, after = taken(Turns(3), [4, 4, 4], [0, 1, 2] * 4)
    assert after == list(range(1, 13))


def test_a_group_does_not_wait_for_choices_that_have_not_begun() -> None:
    _, after = taken(Turns(40, group=2), [3] * 40, [0, 1] * 3)
    assert after == list(range(1, 7))


def test_tokens_that_came_together_are_told_apart() -> None:
    logprobs = tuple(TokenLogprob(token, -1.0, 1) for token in (7, 8))
    together = Emission("r", 1, (7, 8), logprobs, (), FinishReason.STOP, 8, None, 3)
    first, second = steps_of(together)
    assert first == Emission("r", 1, (7,), logprobs[:1], cached_tokens=3)
    assert second == Emission("r", 1, (8,), logprobs[1:], (), FinishReason.STOP, 8)
    assert steps_of(first) == (first,)
