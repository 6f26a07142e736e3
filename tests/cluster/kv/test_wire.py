"""Messages between replica and host: what is written is read, and nothing else is."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.kv.wire import (
    ELSEWHERE,
    MAX_FRAME,
    ON_DISK,
    PREFIX_BYTES,
    Commit,
    Corrupt,
    Entry,
    Fetch,
    Find,
    Found,
    Grant,
    Hello,
    Message,
    Ready,
    Refused,
    Release,
    Welcome,
    WireError,
    body_length,
    decode,
    encode,
)

numbers = st.integers(0, 2**63 - 1)
slots = st.integers(0, 2**31 - 1)
crcs = st.integers(0, 2**32 - 1)
keys = st.binary(min_size=32, max_size=32)
texts = st.text(max_size=20)
entries = st.builds(Entry, slots, keys, keys | st.just(b""), crcs)


def answers(kind: type, places: st.SearchStrategy[int], *before: st.SearchStrategy[int]) -> st.SearchStrategy[Message]:
    """Messages that end with as many CRCs as slots."""
    pairs = st.lists(st.tuples(places, crcs), max_size=5)
    return st.tuples(st.tuples(*before), pairs).map(
        lambda drawn: kind(*drawn[0], [place for place, _ in drawn[1]], [crc for _, crc in drawn[1]])
    )


messages = st.one_of(
    st.builds(Hello, numbers, keys, numbers, texts, st.integers(1, 65_536)),
    st.builds(Commit, st.lists(entries, max_size=5)),
    st.builds(Find, numbers, st.lists(keys, max_size=5)),
    st.builds(Fetch, numbers, numbers),
    st.builds(Release, numbers),
    st.builds(Corrupt, st.lists(keys, max_size=5)),
    st.builds(Welcome, texts, slots, slots),
    st.builds(Refused, texts),
    st.builds(Grant, st.lists(slots, max_size=5)),
    answers(Found, slots | st.sampled_from([ON_DISK, ELSEWHERE]), numbers),
    answers(Ready, slots, numbers, numbers),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=40) | texts,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=10,
)


@given(message=messages)
def test_what_is_written_is_read(message: Message) -> None:
    frame = encode(message)
    assert body_length(frame[:PREFIX_BYTES]) == len(frame) - PREFIX_BYTES
    assert decode(frame[PREFIX_BYTES:]) == message


@given(body=st.binary(max_size=200) | plain.map(msgpack.packb) | st.lists(plain, min_size=1).map(msgpack.packb))
def test_anything_else_is_an_error_of_one_kind_or_a_message_that_is_written_the_same(body: bytes) -> None:
    try:
        message = decode(body)
    except WireError:
        return
    assert decode(encode(message)[PREFIX_BYTES:]) == message


@given(message=messages, data=st.data())
def test_a_cut_frame_is_refused(message: Message, data: st.DataObject) -> None:
    body = encode(message)[PREFIX_BYTES:]
    with pytest.raises(WireError):
        decode(body[: data.draw(st.integers(0, len(body) - 1))])


KEY = b"k" * 32


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([99], "no message of kind 99"),
        ([True, 1], "no message of kind True"),
        ({}, "expected an array"),
        ([4], "Release has 1 fields, got 0"),
        ([4, -1], "Release: expected an integer from 0"),
        ([4, True], "Release: expected an integer"),
        ([4, 2**63], "Release: expected an integer"),
        ([2, 1, [KEY[1:]]], "Find: expected 32 bytes"),
        ([2, 1, ["k" * 32]], "Find: expected 32 bytes"),
        ([2, 1, KEY], "Find: expected an array"),
        ([1, [[0, KEY, b"short", 0]]], "Commit: expected 32 bytes"),
        ([1, [[-1, KEY, b"", 0]]], "Commit: expected an integer"),
        ([1, [[0, KEY, b"", 2**32]]], "Commit: expected an integer"),
        ([1, [[0, KEY, b""]]], "Commit: expected a slot"),
        ([0, 1, KEY, 4096, "n" * 5000, 1], "Hello: expected a text of at most"),
        ([9, 1, [0, -3], [0, 0]], "Found: expected an integer from -2"),
        ([9, 1, [0, 1], [0]], "Found: 2 slots, but 1 CRCs"),
        ([10, 1, 0, [-1], [0]], "Ready: expected an integer"),
    ],
)
def test_the_reason_says_what_is_wrong(content: object, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        decode(msgpack.packb(content))


def test_frames_are_bounded_on_both_sides() -> None:
    with pytest.raises(WireError, match=r"Find has \d+ bytes, more than"):
        encode(Find(1, [KEY] * (MAX_FRAME // 32)))
    assert body_length(MAX_FRAME.to_bytes(4, "little")) == MAX_FRAME
    with pytest.raises(WireError, match="is announced, more than"):
        body_length((MAX_FRAME + 1).to_bytes(4, "little"))


def test_announced_lengths_inside_a_frame_take_no_memory() -> None:
    with pytest.raises(WireError, match="not msgpack"):
        decode(b"\xdd\xff\xff\xff\xff" * 1000)
    with pytest.raises(WireError, match="not msgpack"):
        decode(b"\x91" * MAX_FRAME)
