"""The index over pages by content."""

import pytest

from engine.kv.prefix import PrefixIndex


def test_a_match_ends_at_the_first_page_that_is_missing() -> None:
    index = PrefixIndex()
    index.insert(b"a", 7)
    index.insert(b"abc", 9)
    assert index.match([b"a", b"ab", b"abc"]) == [7]
    index.insert(b"ab", 8)
    assert index.match([b"a", b"ab", b"abc"]) == [7, 8, 9]
    assert index.match([b"x", b"a"]) == []


def test_content_stays_with_the_page_that_had_it_first() -> None:
    index = PrefixIndex()
    index.insert(b"a", 1)
    index.insert(b"a", 2)
    assert index.match([b"a"]) == [1]
    assert 2 not in index and len(index) == 1
    index.check_integrity()


def test_what_is_forgotten_is_not_found() -> None:
    index = PrefixIndex()
    index.insert(b"a", 1)
    index.forget(1)
    assert index.match([b"a"]) == [] and 1 not in index
    with pytest.raises(AssertionError, match="page 3 is indexed already"):
        index.insert(b"c", 3)
        index.insert(b"d", 3)
