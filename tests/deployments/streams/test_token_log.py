"""The log of a stream: whatever is put in comes out, in one process or in several parts."""

import pickle

from hypothesis import given
from hypothesis import strategies as st

from deployments.streams.token_log import TokenLog
from engine.batch import TokenLogprob
from engine.sequence import Emission, FinishReason

logprobs = st.builds(
    TokenLogprob,
    st.integers(0, 99),
    st.floats(-9, 0),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 99), st.floats(-9, 0)), max_size=2).map(tuple),
)
tokens = st.tuples(st.integers(0, 2**31 - 1))
plain = tokens.map(lambda found: Emission("", 0, found))
rich = st.builds(
    Emission,
    st.just(""),
    st.just(0),
    st.one_of(tokens, st.just(())),
    st.one_of(st.just(()), st.tuples(logprobs)),
    st.lists(logprobs, max_size=3).map(tuple),
    st.sampled_from([None, FinishReason.STOP, FinishReason.LENGTH]),
    st.one_of(st.none(), st.integers(0, 99)),
    error=st.none(),
    cached_tokens=st.integers(0, 9),
)
entries = st.lists(st.tuples(st.integers(0, 2047), st.one_of(plain, rich)), max_size=30)


@given(entries, st.lists(st.integers(0, 30), max_size=4))
def test_parts_that_overlap_make_the_same_log_elsewhere(found: list[tuple[int, Emission]], starts: list[int]) -> None:
    # What ended a choice comes with its end and never without.
    found = [(c, e._replace(stop_token_id=e.stop_token_id if e.finish_reason else None)) for c, e in found]
    log, copy = TokenLog(), TokenLog()
    for count, (choice, emission) in enumerate(found):
        log.append(choice, emission)
        if count in starts:
            start = max(0, len(copy) - count % 3)
            part = pickle.loads(pickle.dumps(log.since(start)))
            copy.extend(part, skip=len(copy) - start)
    copy.extend(log.since(len(copy)))
    assert list(copy) == list(log) == found
    assert copy.num_bytes == log.num_bytes
    assert list(log.copy()) == found


def test_a_plain_token_takes_eight_bytes_and_a_logprob_more() -> None:
    log = TokenLog()
    for token in range(1000):
        log.append(0, Emission("", 0, (token,)))
    assert log.num_bytes == 8000
    assert len(pickle.dumps(log.since(0))) < 8500
    log.append(0, Emission("", 0, (1,), (TokenLogprob(1, -0.5, 1, ((1, -0.5),)),)))
    assert log.num_bytes > 8200
