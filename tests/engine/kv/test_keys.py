"""Keys of pages: one for each content with all that is before it."""

from hypothesis import given
from hypothesis import strategies as st

from engine.kv.keys import KEY_BYTES, page_keys, root_key

ROOT = root_key("model")
tokens = st.lists(st.integers(0, 3), max_size=24)


@given(first=tokens, second=tokens, page_tokens=st.integers(1, 4))
def test_two_prompts_have_the_same_key_exactly_while_they_are_the_same(
    first: list[int], second: list[int], page_tokens: int
) -> None:
    count = min(len(first), len(second)) // page_tokens
    keys = [page_keys(ROOT, prompt, page_tokens, count, []) for prompt in (first, second)]
    for page, (one, other) in enumerate(zip(*keys, strict=True), start=1):
        assert (one == other) == (first[: page * page_tokens] == second[: page * page_tokens])


@given(prompt=tokens, page_tokens=st.integers(1, 4), data=st.data())
def test_keys_asked_for_bit_by_bit_are_those_asked_for_at_once(
    prompt: list[int], page_tokens: int, data: st.DataObject
) -> None:
    count = len(prompt) // page_tokens
    known: list[bytes] = []
    for some in sorted(data.draw(st.lists(st.integers(0, count), max_size=4))):
        assert len(page_keys(ROOT, prompt, page_tokens, some, known)) == some
    assert page_keys(ROOT, prompt, page_tokens, count, known) == page_keys(ROOT, prompt, page_tokens, count, [])
    assert all(len(key) == KEY_BYTES for key in known)


def test_pages_under_different_roots_have_nothing_in_common() -> None:
    roots = [root_key(), root_key(""), root_key("a", "b"), root_key("ab"), root_key("ab", ""), root_key("b", "a")]
    keys = [page_keys(root, [1, 2], 1, 2, []) for root in roots]
    assert len({key for chain in keys for key in chain}) == 2 * len(roots)
