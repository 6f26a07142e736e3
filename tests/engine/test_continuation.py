"""Requests that go on from another engine."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from engine.policy import LEAST_CHUNK
from tests.engine.fake_tier import Contents, FakeTier
from tests.engine.fakes import VOCAB, run_to_end
from tests.engine.rig import Rig, expected, left_behind, request


@settings(max_examples=100)
@given(
    n=st.integers(1, 3),
    length=st.integers(1, 20),
    max_tokens=st.integers(2, 12),
    cuts=st.lists(st.integers(0, 14), min_size=3, max_size=3),
)
def test_a_request_that_was_cut_goes_on_with_the_tokens_it_would_have_drawn(
    n: int, length: int, max_tokens: int, cuts: list[int]
) -> None:
    prompt = list(range(length))
    whole = [expected(prompt, max_tokens, 3, index) for index in range(n)]
    given_tokens = tuple(None if cut >= max_tokens else tuple(whole[index][:cut]) for index, cut in enumerate(cuts[:n]))
    rig = Rig()
    cut = replace(request("r", prompt, n=n, max_tokens=max_tokens, seed=3), given=given_tokens)
    if all(tokens is None for tokens in given_tokens):
        with pytest.raises(InvalidRequest, match="at least one unfinished"):
            rig.engine.add(cut)
        return
    rig.engine.add(cut)
    rig.check()
    streams = run_to_end(rig.engine)
    for index, tokens in enumerate(given_tokens):
        assert streams.tokens.get(("r", index), []) == ([] if tokens is None else whole[index][len(tokens) :])
    assert rig.engine.stats().prompt_tokens_total == 0, "it was counted where it was first admitted"
    assert not streams.cached
    rig.check_nothing_left()


def test_a_request_that_goes_on_comes_before_those_that_wait() -> None:
    rig = Rig(max_sequences=1, max_batch_tokens=4)
    rig.engine.add(request("running", [1], max_tokens=3))
    rig.step()
    rig.engine.add(request("waiting", [2], max_tokens=3))
    rig.engine.add(replace(request("cut", [3], max_tokens=3), given=((5,),)))
    assert [name for name, _ in run_to_end(rig.engine, rig.streams).finished] == ["running", "cut", "waiting"]


def test_a_stream_whose_pages_are_there_waits_for_nobodys_prompt() -> None:
    stem, answer = list(range(50)), expected(list(range(50)), 4)
    contents = left_behind(request("cut", stem, max_tokens=2))
    for delay in (0, 3):
        rig = Rig(num_pages=400, page_tokens=4, max_batch_tokens=200, tier=FakeTier(contents, delay=lambda d=delay: d))
        rig.engine.add(request("long", [90] * 1000, max_tokens=2))
        rig.step()
        rig.step()
        rig.engine.add(replace(request("cut", stem, max_tokens=4), given=(tuple(answer[:2]),)))
        before = len(rig.runner.batches)
        while ("cut", 0) not in rig.streams.tokens:
            rig.step()
        (batch,) = rig.runner.batches[before:]
        assert batch.num_tokens == 52 - 48, "what a page had no room for, and nothing of the long prompt"
        streams = run_to_end(rig.engine, rig.streams)
        assert streams.tokens["cut", 0] == answer[2:]
        assert streams.tokens["long", 0] == expected([90] * 1000, 2), "its turn came"
        rig.check_nothing_left()


def test_streams_that_decode_wait_for_one_whose_pages_are_there() -> None:
    stem, answer = list(range(50)), expected(list(range(50)), 4)
    contents = left_behind(request("cut", stem, max_tokens=2))
    rig = Rig(num_pages=400, page_tokens=4, max_batch_tokens=200, tier=FakeTier(contents, delay=lambda: 3))
    rig.engine.add(request("decodes", [1, 2], max_tokens=8))
    rig.step()
    rig.engine.add(replace(request("cut", stem, max_tokens=4), given=(tuple(answer[:2]),)))
    before = len(rig.runner.batches)
    while ("cut", 0) not in rig.streams.tokens:
        rig.step()
    (batch,) = rig.runner.batches[before:]
    assert batch.num_tokens == 52 - 48, "what a page had no room for, and nobody's decode"
    rig.step()
    assert rig.runner.batches[-1].num_tokens == 2, "both decode from now on"
    streams = run_to_end(rig.engine, rig.streams)
    assert (streams.tokens["cut", 0], streams.tokens["decodes", 0]) == (answer[2:], expected([1, 2], 8))
    rig.check_nothing_left()


def test_all_samples_of_a_request_go_on_as_soon_as_the_pages_of_its_prompt_are_there() -> None:
    prompt = list(range(50))
    contents = left_behind(request("cut", prompt, n=3, max_tokens=2, seed=3))
    whole = [expected(prompt, 5, 3, index) for index in range(3)]
    rig = Rig(num_pages=400, page_tokens=4, max_batch_tokens=200, tier=FakeTier(contents))
    given_tokens = tuple(tuple(tokens[:1]) for tokens in whole)
    rig.engine.add(replace(request("cut", prompt, n=3, max_tokens=5, seed=3), given=given_tokens))
    while not rig.streams.tokens:
        rig.step()
    (batch,) = rig.runner.batches
    assert (batch.num_sequences, batch.num_tokens) == (3, 3 * (51 - 48))
    streams = run_to_end(rig.engine, rig.streams)
    assert [streams.tokens["cut", index] for index in range(3)] == [tokens[1:] for tokens in whole]
    rig.check_nothing_left()


def test_a_stream_that_is_computed_again_lets_others_go_on() -> None:
    rig = Rig(num_pages=400, page_tokens=4, max_batch_tokens=300)
    rig.engine.add(request("decodes", [1, 2], max_tokens=8))
    rig.step()
    rig.engine.add(replace(request("cut", [90] * 1000, max_tokens=3), given=((5,),)))
    rig.engine.add(replace(request("also cut", [80] * 700, max_tokens=3), given=((5,),)))
    begun = len(rig.streams.tokens["decodes", 0])
    for _ in range(3):
        rig.step()
    assert len(rig.streams.tokens["decodes", 0]) == begun + 3
    tokens = [batch.num_tokens for batch in rig.runner.batches[1:4]]
    assert tokens == [1 + LEAST_CHUNK, 300, 300], "all but one are theirs; how long theirs take was not known at first"
    assert sorted(name for name, _ in run_to_end(rig.engine, rig.streams).finished) == ["also cut", "cut", "decodes"]
    rig.check_nothing_left()


def test_given_tokens_are_checked() -> None:
    rig = Rig()
    good = request("r", [1, 2], n=2, max_tokens=3)
    for given_tokens, complaint in (
        (((1,),), "expected 2 with at least one unfinished"),
        (((1, 2, 3), None), "given 3 tokens of at most 3"),
        (((VOCAB,), None), "not in the vocabulary"),
    ):
        with pytest.raises(InvalidRequest, match=complaint):
            rig.engine.add(replace(good, given=given_tokens))


def test_prompt_logprobs_go_on_where_they_were_cut() -> None:
    rig = Rig(max_batch_tokens=100)
    cut = replace(request("r", list(range(10)), max_tokens=3, prompt_logprobs=0), given=((),), num_scored=4)
    rig.engine.add(cut)
    found = run_to_end(rig.engine).prompt_logprobs["r", 0]
    assert [logprob.token_id for logprob in found] == [5, 6, 7, 8, 9]


def test_prompt_logprobs_that_were_reported_are_not_computed_again_where_the_tier_has_their_pages() -> None:
    contents: Contents = {}
    first = Rig(page_tokens=4, max_batch_tokens=100, tier=FakeTier(contents))
    first.engine.add(request("r", list(range(30)), max_tokens=1, prompt_logprobs=0))
    whole = run_to_end(first.engine, first.streams).prompt_logprobs["r", 0]
    rig = Rig(page_tokens=4, max_batch_tokens=100, tier=FakeTier(contents))
    cut = replace(request("r", list(range(30)), max_tokens=3, prompt_logprobs=0), given=((),), num_scored=18)
    rig.engine.add(cut)
    streams = run_to_end(rig.engine, rig.streams)
    assert streams.prompt_logprobs["r", 0] == whole[18:]
    assert streams.tokens["r", 0] == expected(list(range(30)), 3)
    assert rig.runner.batches[0].num_tokens == 30 - 16
