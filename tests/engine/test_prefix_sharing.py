"""Prompts that begin alike: who finds whose pages."""

from tests.engine.fakes import run_to_end
from tests.engine.rig import Rig, expected, request


def test_a_prompt_that_begins_like_an_earlier_one_computes_only_the_rest() -> None:
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100)
    stem = list(range(18))
    rig.engine.add(request("first", stem, max_tokens=2))
    run_to_end(rig.engine, rig.streams)
    before = len(rig.runner.batches)
    rig.engine.add(request("second", [*stem, 50, 51, 52], max_tokens=2))
    streams = run_to_end(rig.engine, rig.streams)
    assert rig.runner.batches[before].num_tokens == 21 - 16
    assert streams.tokens["second", 0] == expected([*stem, 50, 51, 52], 2)
    assert streams.cached == {("second", 0): 16}
    stats = rig.engine.stats()
    assert (stats.prompt_tokens_total, stats.prefix_queries_total, stats.prefix_hits_total) == (39, 39, 16)
    rig.check_nothing_left()


def test_a_prompt_that_is_there_already_computes_its_last_token_alone() -> None:
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100)
    for name in ("first", "second"):
        rig.engine.add(request(name, list(range(16)), max_tokens=1))
        run_to_end(rig.engine, rig.streams)
    assert rig.runner.batches[-1].num_tokens == 4, "the page with the last token is computed again"
    assert rig.streams.tokens["second", 0] == rig.streams.tokens["first", 0]


def test_the_next_turn_of_a_conversation_finds_the_answer_before_it() -> None:
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100)
    prompt = list(range(6))
    rig.engine.add(request("first", prompt, max_tokens=11))
    answer = run_to_end(rig.engine, rig.streams).tokens["first", 0]
    turn = [*prompt, *answer, 60, 61]
    rig.engine.add(request("next", turn, max_tokens=1))
    run_to_end(rig.engine, rig.streams)
    assert rig.streams.cached == {("next", 0): 16}, "all but the last token drawn were computed: four pages"


def test_other_salts_and_switched_off_caches_share_nothing() -> None:
    for prefix_caching, salts in ((True, ("a", "b")), (True, (None, "a")), (False, (None, None))):
        rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, prefix_caching=prefix_caching)
        for number, salt in enumerate(salts):
            rig.engine.add(request(str(number), list(range(18)), n=2, max_tokens=1, salt=salt))
            run_to_end(rig.engine, rig.streams)
        assert not rig.streams.cached
        firsts = [batch for batch in rig.runner.batches if batch.num_tokens == 18]
        assert len(firsts) == 2, "each computed its prompt"
        assert [batch.num_tokens for batch in rig.runner.batches] == [18, 2, 18, 2], "its samples shared it"


def test_equal_salts_share() -> None:
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100)
    for name in ("first", "second"):
        rig.engine.add(request(name, list(range(18)), max_tokens=1, salt="a"))
        run_to_end(rig.engine, rig.streams)
    assert rig.streams.cached == {("second", 0): 16}


def test_logprobs_of_a_prompt_are_computed_though_it_is_cached() -> None:
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100)
    for name in ("first", "second"):
        rig.engine.add(request(name, list(range(18)), max_tokens=1, prompt_logprobs=0))
        run_to_end(rig.engine, rig.streams)
    assert len(rig.streams.prompt_logprobs["second", 0]) == 17
    assert not rig.streams.cached


def test_a_preempted_sequence_goes_on_from_the_pages_that_nobody_took() -> None:
    rig = Rig(num_pages=12, page_tokens=2, max_batch_tokens=100)
    rig.engine.add(request("early", [1, 2, 3], max_tokens=14))
    rig.engine.add(request("late", [4, 5, 6, 7, 8, 9], max_tokens=10))
    streams = run_to_end(rig.engine, rig.streams)
    assert rig.engine.stats().preemptions_total > 0
    assert streams.tokens["late", 0] == expected([4, 5, 6, 7, 8, 9], 10)
    prefilled = sum(batch.num_tokens - batch.num_sequences for batch in rig.runner.batches)
    assert prefilled < 2 + 5 + 6, "it was not prefilled from its first token again"
    rig.check_nothing_left()


def test_pages_of_a_sequence_whose_logits_were_bad_are_not_found() -> None:
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, poison=13)
    for name in ("first", "second"):
        rig.engine.add(request(name, list(range(18)), max_tokens=1))
        run_to_end(rig.engine, rig.streams)
    assert [batch.num_tokens for batch in rig.runner.batches] == [18, 18]
