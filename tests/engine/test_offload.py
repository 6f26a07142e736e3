"""Pages that leave the device and come back: who waits, what is computed again, and that no token changes."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv.tier import Loaded
from engine.offload import Score
from tests.engine.fake_tier import Contents, FakeTier, at_random
from tests.engine.fakes import run_to_end
from tests.engine.rig import Rig, expected, request


def test_what_one_engine_has_computed_another_one_loads() -> None:
    contents: Contents = {}
    first = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=FakeTier(contents))
    stem = list(range(18))
    first.engine.add(request("first", stem, max_tokens=7))
    answer = run_to_end(first.engine, first.streams).tokens["first", 0]
    assert len(contents) == (18 + 6) // 4, "every full page, those of the answer too"
    second = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=FakeTier(contents))
    turn = [*stem, *answer, 60, 61]
    second.engine.add(request("next", turn, max_tokens=2))
    streams = run_to_end(second.engine, second.streams)
    assert streams.tokens["next", 0] == expected(turn, 2)
    assert [batch.num_tokens for batch in second.runner.batches] == [len(turn) - 24, 1]
    assert streams.cached == {("next", 0): 24}
    assert second.engine.stats().prefix_hits_total == 24
    second.check_nothing_left()


def test_other_namespaces_find_nothing() -> None:
    contents: Contents = {}
    for namespace in ("model a", "model b"):
        rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=FakeTier(contents), namespace=namespace)
        rig.engine.add(request("x", list(range(18)), max_tokens=1))
        run_to_end(rig.engine, rig.streams)
        assert rig.runner.batches[0].num_tokens == 18


def test_without_prefix_caching_only_a_sequence_itself_finds_its_pages() -> None:
    contents: Contents = {}
    for _ in range(2):
        rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=FakeTier(contents), prefix_caching=False)
        rig.engine.add(request("x", list(range(18)), max_tokens=1))
        run_to_end(rig.engine, rig.streams)
        assert rig.runner.batches[0].num_tokens == 18


def test_a_preempted_sequence_comes_back_without_computing_what_was_saved() -> None:
    prompts = {"early": list(range(20)), "late": list(range(50, 70))}
    computed = {}
    for tier in (None, FakeTier()):
        rig = Rig(num_pages=14, page_tokens=2, max_batch_tokens=100, tier=tier)
        for name, prompt in prompts.items():
            rig.engine.add(request(name, prompt[:12], max_tokens=15))
        streams = run_to_end(rig.engine, rig.streams)
        assert rig.engine.stats().preemptions_total > 0
        for name, prompt in prompts.items():
            assert streams.tokens[name, 0] == expected(prompt[:12], 15)
        computed[tier is not None] = sum(batch.num_tokens for batch in rig.runner.batches)
        rig.check()
    assert computed[True] < computed[False]
    needed = 2 * (12 + 14)
    assert computed[True] <= needed + 2 * rig.engine.stats().preemptions_total, "a page that was not full, each time"


def test_what_a_preempted_sequence_has_just_computed_is_copied_before_others_take_its_pages() -> None:
    rig = Rig(num_pages=18, page_tokens=2, max_batch_tokens=100, tier=FakeTier(max_saving=16))
    for name in "ab":
        rig.engine.add(request(name, [80, 81, 82], max_tokens=3, salt=name))
    rig.step()
    rig.engine.add(request("late", list(range(24)), priority=2, max_tokens=3))
    rig.step()
    rig.engine.add(request("first", list(range(40, 50)), priority=1, max_tokens=1))
    streams = run_to_end(rig.engine, rig.streams)
    assert rig.engine.stats().preemptions_total == 1
    assert streams.tokens["late", 0] == expected(list(range(24)), 3)
    assert sum(batch.num_tokens for batch in rig.runner.batches) <= 2 * (3 + 2) + (24 + 2) + 10 + 2


def test_a_late_load_delays_only_its_own_sequence() -> None:
    contents: Contents = {}
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=FakeTier(contents))
    stem = list(range(18))
    rig.engine.add(request("first", stem, max_tokens=1))
    run_to_end(rig.engine, rig.streams)
    late = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=FakeTier(contents, delay=lambda: 10))
    late.engine.add(request("loads", stem, max_tokens=3))
    late.engine.add(request("computes", [80, 81, 82], max_tokens=5))
    while ("computes", 0) not in late.streams.finished:
        late.step()
    assert ("loads", 0) not in late.streams.tokens
    streams = run_to_end(late.engine, late.streams)
    assert streams.tokens["loads", 0] == expected(stem, 3)
    assert late.tier is not None and late.tier.polls_that_waited > 0, "an engine with nothing else to do sleeps"


def tight(tier: FakeTier) -> Rig:
    """An engine in whose pool a sequence that decodes has no page left to grow into, as a later one that loads has the
    rest; what that one loads was computed here before."""
    rig = Rig(num_pages=14, page_tokens=2, max_batch_tokens=100, tier=tier)
    rig.engine.add(request("loads", list(range(18)), max_tokens=1, salt="s"))
    run_to_end(rig.engine, rig.streams)
    rig.engine.add(request("other", list(range(30, 57)), max_tokens=1))
    run_to_end(rig.engine, rig.streams)
    tier.slow_down(1_000)
    rig.engine.add(request("decodes", [80, 81], max_tokens=9))
    rig.engine.add(request("loads later", list(range(19)), max_tokens=3, salt="s"))
    return rig


def test_a_late_load_gives_its_pages_up_to_an_earlier_sequence_that_needs_them() -> None:
    tier = FakeTier()
    rig = tight(tier)
    steps = 0
    while ("decodes", 0) not in rig.streams.finished:
        rig.step()
        steps += 1
    assert tier.given_up, "the pool was tight"
    assert rig.streams.tokens["decodes", 0] == expected([80, 81], 9)
    assert steps <= 12, "it waits for no answer of the tier but that one"
    decoded = [batch for batch in rig.runner.batches if 80 in batch.token_ids.tolist()]
    assert len(decoded) == 1, "what it had computed is not computed again"
    tier.hurry()
    streams = run_to_end(rig.engine, rig.streams)
    assert streams.tokens["loads later", 0] == expected(list(range(19)), 3)
    rig.check_nothing_left()


def test_a_sequence_keeps_its_pages_while_others_that_are_copied_will_be_free() -> None:
    tier = FakeTier(max_saving=16)
    rig = Rig(num_pages=14, page_tokens=2, max_batch_tokens=100, tier=tier)
    tier.slow_down(5)
    rig.engine.add(request("over", list(range(22)), max_tokens=1))
    rig.step()
    rig.engine.add(request("x", [80, 81], max_tokens=12))
    streams = run_to_end(rig.engine, rig.streams)
    assert streams.tokens["x", 0] == expected([80, 81], 12)
    assert tier.polls_that_waited > 0, "the pool was tight"
    assert rig.engine.stats().preemptions_total == 0


def test_an_aborted_load_gives_its_pages_back_when_it_is_over() -> None:
    contents: Contents = {}
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=FakeTier(contents))
    rig.engine.add(request("first", list(range(18)), max_tokens=1))
    run_to_end(rig.engine, rig.streams)
    late = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=FakeTier(contents, delay=lambda: 3))
    late.engine.add(request("x", list(range(18)), max_tokens=3))
    late.step()
    late.engine.abort("x")
    assert late.pool.num_free < 100, "the tier may still write to them"
    assert late.tier is not None and len(late.tier.given_up) == 1
    run_to_end(late.engine, late.streams)
    late.check_nothing_left()


def test_loads_are_scored_against_what_was_predicted() -> None:
    contents: Contents = {}
    writer = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=FakeTier(contents))
    for name in "ab":
        writer.engine.add(request(name, list(range(18)), max_tokens=1, salt=name))
        run_to_end(writer.engine, writer.streams)
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=FakeTier(contents))
    score = rig.scheduler.offload.score
    rig.engine.add(request("a", list(range(18)), max_tokens=1, salt="a"))
    run_to_end(rig.engine, rig.streams)
    assert score.actual == score.saved == 0.0, "nothing was known yet of what computing costs"
    rig.scheduler.offload.prefill.observe(100, 5050, 1.0)
    rig.engine.add(request("b", list(range(18)), max_tokens=1, salt="b"))
    run_to_end(rig.engine, rig.streams)
    assert (score.actual, score.predicted, score.saved, score.regretted) == (2.0, 1.0, 3.0, 0.0)


def test_a_load_that_brings_nothing_is_regretted_for_as_long_as_it_took() -> None:
    score = Score()
    score.add(Loaded(1, 0, seconds=5.0, predicted_seconds=0.5))
    assert (score.actual, score.predicted, score.saved, score.regretted) == (5.0, 0.5, 0.0, 5.0)


def test_copying_holds_a_small_part_of_the_pool_and_goes_on_in_order() -> None:
    rig = Rig(num_pages=160, page_tokens=2, max_batch_tokens=100, tier=FakeTier(delay=lambda: 2, max_saving=50))
    rig.engine.add(request("x", list(range(60)), max_tokens=40))
    held = []
    while ("x", 0) not in rig.streams.finished:
        rig.step()
        held.append(len(rig.scheduler.offload.held_pages))
    run_to_end(rig.engine, rig.streams)
    assert max(held) == 20
    assert rig.tier is not None
    saves = rig.tier.offered
    assert len(saves) == (60 + 39) // 2
    assert [save.parent for save in saves] == [b"", *(save.key for save in saves[:-1])]


def test_a_page_is_offered_once_for_as_long_as_the_tier_has_it() -> None:
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=FakeTier())
    for name in "abc":
        rig.engine.add(request(name, list(range(18)), n=2, max_tokens=1))
        run_to_end(rig.engine, rig.streams)
    assert rig.tier is not None
    assert len(rig.tier.offered) == 4


def all_there(contents: Contents, tokens: list[int], *, salt: str | None = None) -> bool:
    """Whether another engine would find every full page of these tokens, but for the last token's."""
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=FakeTier(dict(contents)))
    rig.engine.add(request("other", tokens, max_tokens=1, salt=salt))
    run_to_end(rig.engine, rig.streams)
    return rig.streams.cached == {("other", 0): (len(tokens) - 1) // 4 * 4}


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("away", [0, 1, 12])
def test_a_host_that_comes_back_is_given_what_a_stream_computed_before(away: int, delay: int) -> None:
    """It may be away for less than an iteration, with pages on their way to it that it will never have."""
    tier = FakeTier(delay=lambda: delay)
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=tier)
    prompt = list(range(18))
    rig.engine.add(request("x", prompt, max_tokens=40))
    for _ in range(9):
        rig.step()
    assert tier.contents
    tier.end_host()
    for _ in range(away):
        rig.step()
    tier.start_host()
    answer = run_to_end(rig.engine, rig.streams).tokens["x", 0]
    assert all_there(tier.contents, [*prompt, *answer])
    rig.check_nothing_left()


def test_a_host_that_comes_back_is_given_the_beginnings_that_are_asked_for_again() -> None:
    tier = FakeTier()
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=tier)
    stem = list(range(40))
    rig.engine.add(request("first", stem, max_tokens=1))
    run_to_end(rig.engine, rig.streams)
    tier.end_host()
    tier.start_host()
    rig.engine.add(request("second", [*stem, *range(50, 60)], max_tokens=1))
    run_to_end(rig.engine, rig.streams)
    assert rig.streams.cached == {("second", 0): 40}, "it found them on the device"
    assert all_there(tier.contents, [*stem, *range(50, 60)])


def test_what_was_computed_before_there_was_a_host_is_offered_once_there_is_one_and_never_to_nobody() -> None:
    tier = FakeTier()
    tier.end_host()
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=tier)
    for name in ("early", "late"):
        rig.engine.add(request(name, list(range(18)), max_tokens=20, salt=name))
    for _ in range(6):
        rig.step()
    rig.engine.abort("early")
    rig.step()
    assert not tier.offered and not rig.scheduler.offload.busy
    tier.start_host()
    answer = run_to_end(rig.engine, rig.streams).tokens["late", 0]
    assert all_there(tier.contents, [*range(18), *answer], salt="late")


@pytest.mark.parametrize("refused", range(8))
def test_a_page_that_is_refused_once_does_not_hide_those_after_it_for_ever(refused: int) -> None:
    answers = iter([number != refused for number in range(10)])
    tier = FakeTier(takes=lambda: next(answers, True))
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=tier)
    prompt = list(range(18))
    rig.engine.add(request("x", prompt, max_tokens=40))
    answer = run_to_end(rig.engine, rig.streams).tokens["x", 0]
    assert all_there(tier.contents, [*prompt, *answer])


def test_a_page_that_the_tier_has_lost_meanwhile_is_offered_again_with_those_after_it() -> None:
    tier = FakeTier()
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=tier)
    prompt = list(range(18))
    rig.engine.add(request("x", prompt, max_tokens=40))
    for _ in range(9):
        rig.step()
    tier.contents.popitem()
    answer = run_to_end(rig.engine, rig.streams).tokens["x", 0]
    assert all_there(tier.contents, [*prompt, *answer])


def test_a_tier_too_small_for_a_sequence_is_not_offered_its_end_for_ever() -> None:
    contents: Contents = {}
    tier = FakeTier(contents, takes=lambda: len(contents) < 4)
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=tier)
    rig.engine.add(request("x", list(range(18)), max_tokens=200))
    run_to_end(rig.engine, rig.streams)
    assert len(tier.offered) < 2 * (18 + 199) // 4, "each once, and all of them once more"


def test_pages_that_no_tier_takes_keep_nobody_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.offload.STARVED_S", 0.05)
    tier = FakeTier(max_saving=0)
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=tier)
    rig.engine.add(request("x", list(range(18)), max_tokens=1))
    run_to_end(rig.engine, rig.streams, max_steps=1_000_000)
    tier.take(16)
    rig.engine.add(request("y", list(range(18)), max_tokens=1))
    run_to_end(rig.engine, rig.streams)
    assert len(tier.contents) == 4, "they wait all the same"


def test_pages_that_came_from_the_host_are_not_offered_to_it_but_to_the_next() -> None:
    contents: Contents = {}
    first = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=FakeTier(contents))
    first.engine.add(request("first", list(range(18)), max_tokens=1))
    run_to_end(first.engine, first.streams)
    had = set(contents)
    tier = FakeTier(contents)
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=tier)
    prompt = [*range(18), *range(50, 60)]
    rig.engine.add(request("second", prompt, max_tokens=30))
    for _ in range(15):
        rig.step()
    assert not had & {save.key for save in tier.offered}
    assert sum(tier.looked.count(key) for key in had) == 1, "once, for the first of them"
    tier.end_host()
    tier.start_host()
    answer = run_to_end(rig.engine, rig.streams).tokens["second", 0]
    assert all_there(tier.contents, [*prompt, *answer])


def test_pages_of_another_node_are_asked_for_where_that_is_worth_it() -> None:
    contents: Contents = {}
    first = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=FakeTier(contents))
    stem = list(range(82))
    first.engine.add(request("first", stem, max_tokens=1))
    run_to_end(first.engine, first.streams)
    # A token was seen to take 1 ms: 82 are worth asking for a stream that was cut, and not for a new one.
    for moved, token_seconds, found in ((False, 1e-3, 0), (False, 1e-2, 80), (True, 1e-3, 80), (True, 1e-4, 0)):
        tier = FakeTier(contents, is_local=False)
        rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=tier)
        rig.scheduler.offload.prefill.observe(100, 5050, 100 * token_seconds)
        asked = request("second", stem, max_tokens=2)
        rig.engine.add(replace(asked, given=((),)) if moved else asked)
        assert run_to_end(rig.engine, rig.streams).tokens["second", 0] == expected(stem, 2)
        assert [4 * count for _, count in tier.loads] == ([found] if found else [])
        assert rig.runner.batches[0].num_tokens == 82 - found
        rig.check_nothing_left()
    tier = FakeTier(contents, is_local=False)
    tier.end_host()
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100, tier=tier)
    rig.scheduler.offload.prefill.observe(100, 5050, 1.0)
    rig.engine.add(request("second", stem, max_tokens=2))
    run_to_end(rig.engine, rig.streams)
    assert not tier.loads, "there is nobody to ask"


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), depth=st.integers(1, 3), pages=st.integers(10, 40))
def test_no_disturbance_of_the_tier_changes_a_token(seed: int, depth: int, pages: int) -> None:
    chance = random.Random(seed)
    contents: Contents = {}
    rigs = [
        Rig(num_pages=pages, page_tokens=2, max_batch_tokens=24, depth=depth, tier=at_random(seed + i, contents))
        for i in range(2)
    ]
    wanted = {}
    stems = [[chance.randrange(90) for _ in range(chance.randint(1, 12))] for _ in range(3)]
    for number in range(12):
        prompt = [*chance.choice(stems), *(chance.randrange(90) for _ in range(chance.randint(0, 3)))]
        length = chance.randint(1, min(10, 2 * pages - len(prompt) - 1))
        rig = chance.choice(rigs)
        samples = chance.randint(1, 2)
        rig.engine.add(request(str(number), prompt, n=samples, max_tokens=length))
        for sample in range(samples):
            wanted[number, sample] = rig, expected(prompt, length, sample_index=sample)
        for _ in range(chance.randint(0, 4)):
            for other in rigs:
                other.step()
        if chance.random() < 0.2:
            contents.pop(chance.choice(sorted(contents)), None) if contents else None
        if chance.random() < 0.2:
            for other in rigs:
                assert other.tier is not None
                chance.choice((other.tier.end_host, other.tier.start_host))()
        if chance.random() < 0.15:
            gone = chance.randrange(number + 1)
            for other in rigs:
                other.engine.abort(str(gone))
            for sample in range(2):
                wanted.pop((gone, sample), None)
    for rig in rigs:
        while rig.engine.has_work():
            rig.step()
        rig.check_nothing_left()
    for (number, sample), (rig, tokens) in wanted.items():
        assert rig.streams.tokens[str(number), sample] == tokens
