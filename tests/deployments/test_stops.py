"""Stop strings against a naive reference, whatever the pieces the text comes in."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.stops import StopMatcher

# A small alphabet makes overlaps, repetitions and near misses the common case.
TEXT = st.text(alphabet="ab\n", max_size=40)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4)


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Reads the text character by character, the whole of it each time."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return (text[:end] if include else text[: end - len(longest)]), longest
    return text, None


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[list[str], str | None]:
    matcher = StopMatcher(stops, include=include)
    shown = []
    for piece in pieces:
        shown.append(matcher.push(piece))
        if matcher.matched is not None:
            return shown, matcher.matched
    return [*shown, matcher.flush()], None


@given(text=TEXT, cuts=st.lists(st.integers(0, 40), max_size=8), stops=STOPS, include=st.booleans())
def test_any_division_of_a_text_shows_what_the_whole_would(text, cuts, stops, include):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    shown, matched = run(pieces, stops, include)
    assert ("".join(shown), matched) == reference(text, stops, include)


@given(text=TEXT, stops=STOPS)
def test_text_that_cannot_become_a_stop_string_is_shown_at_once(text, stops):
    matcher = StopMatcher(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += matcher.push(character)
        if matcher.matched is not None:
            return
        undecided = text[len(shown) : end]
        assert not undecided or any(stop.startswith(undecided) for stop in stops)


def test_the_beginning_of_a_stop_string_is_held_back_and_released():
    matcher = StopMatcher(["</s>"])
    assert [matcher.push(piece) for piece in ("a<", "/", "b", "</s")] == ["a", "", "</b", ""]
    assert matcher.flush() == "</s"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""])
