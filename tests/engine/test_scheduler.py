"""The scheduler against a fake device, under random arrivals, lengths, aborts, priorities and tiny pools."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest
from engine.sequence import FinishReason
from tests.engine.fakes import VOCAB, run_to_end
from tests.engine.rig import Rig, expected, request

arrivals = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt tokens
        st.integers(1, 20),  # max_tokens
        st.integers(1, 4),  # n
        st.integers(-1, 1),  # priority
        st.integers(0, 5),  # steps before the next arrival
        st.integers(0, 2),  # which stem the prompt begins with
        st.one_of(st.none(), st.none(), st.integers(0, 12)),  # abort after so many steps
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=300)
@given(
    arrivals=arrivals,
    num_pages=st.integers(13, 40),
    max_sequences=st.integers(1, 6),
    max_batch_tokens=st.integers(1, 24),
    admission=st.sampled_from(["optimistic", "reserve"]),
    depth=st.integers(1, 3),
)
def test_every_request_finishes_with_its_own_tokens_and_no_page_leaks(
    arrivals: list, num_pages: int, max_sequences: int, max_batch_tokens: int, admission: str, depth: int
) -> None:
    rig = Rig(num_pages, 4, max_sequences, max_batch_tokens, admission, depth)
    wanted: dict[tuple[str, int], list[int]] = {}
    aborts: dict[int, list[str]] = {}
    aborted: set[str] = set()
    now = 0

    def step() -> None:
        nonlocal now
        for name in aborts.pop(now, ()):
            rig.engine.abort(name)
            aborted.add(name)
            rig.check()
        rig.step()
        now += 1

    for number, (length, max_tokens, n, priority, gap, stem, abort_after) in enumerate(arrivals):
        name, prompt = f"r{number}", [(stem * 7 + i) % VOCAB for i in range(length)]
        rig.engine.add(request(name, prompt, n=n, max_tokens=max_tokens, priority=priority, seed=number))
        rig.check()
        for index in range(n):
            wanted[name, index] = expected(prompt, max_tokens, number, index)
        if abort_after is not None:
            aborts.setdefault(now + abort_after, []).append(name)
        for _ in range(gap):
            step()
    steps = 0
    while rig.engine.has_work():
        step()
        steps += 1
        assert steps < 20_000, "the engine does not come to an end"
    for (name, index), tokens in wanted.items():
        got = rig.streams.tokens.get((name, index), [])
        if name in aborted:
            assert got == tokens[: len(got)]
        else:
            assert got == tokens
            assert rig.streams.finished[name, index].finish_reason is FinishReason.LENGTH
    rig.check_nothing_left()


@settings(max_examples=150)
@given(
    arrivals=arrivals,
    num_pages=st.integers(13, 30),
    max_batch_tokens=st.integers(4, 24),
    admission=st.sampled_from(["optimistic", "reserve"]),
)
def test_nobody_is_overtaken_within_a_priority(
    arrivals: list, num_pages: int, max_batch_tokens: int, admission: str
) -> None:
    """Orca's FCFS property, for one sample a request: whoever waits came after everyone who runs."""
    rig = Rig(num_pages, 4, 4, max_batch_tokens, admission)
    for number, (length, max_tokens, _, priority, gap, _, _) in enumerate(arrivals):
        rig.engine.add(request(f"r{number}", [number] * length, max_tokens=max_tokens, priority=priority))
        for _ in range(gap):
            rig.step()
            for level in (-1, 0, 1):
                running = [s.order for s in rig.scheduler.running if s.order.priority == level]
                waiting = [s.order for s in rig.scheduler.waiting if s.order.priority == level]
                assert not running or not waiting or max(running) < min(waiting)
    run_to_end(rig.engine, rig.streams)
    rig.check_nothing_left()


@settings(max_examples=100)
@given(
    prompts=st.lists(st.integers(1, 25), min_size=2, max_size=8),
    max_batch_tokens=st.integers(2, 32),
)
def test_preemption_and_chunking_do_not_change_tokens(prompts: list[int], max_batch_tokens: int) -> None:
    def run(num_pages: int, budget: int) -> tuple[dict, int]:
        rig = Rig(num_pages, 2, 2, budget)
        for number, length in enumerate(prompts):
            rig.engine.add(request(f"r{number}", list(range(length)), max_tokens=9, seed=number))
        streams = run_to_end(rig.engine)
        rig.check_nothing_left()
        return streams.tokens, rig.engine.stats().preemptions_total

    roomy, none = run(1000, 1000)
    tight, _ = run(17, max_batch_tokens)
    assert none == 0
    assert tight == roomy


def test_a_tiny_pool_does_preempt_and_the_latest_yields() -> None:
    rig = Rig(num_pages=6, page_tokens=2, max_sequences=4, max_batch_tokens=8)
    rig.engine.add(request("early", [1, 2, 3], max_tokens=8))
    rig.engine.add(request("late", [4, 5, 6], max_tokens=8))
    order = []
    while rig.engine.has_work():
        rig.step()
        order += [key[0] for key in rig.streams.finished if key[0] not in order]
    assert order == ["early", "late"]
    assert rig.engine.stats().preemptions_total >= 1
    assert rig.engine.stats().prompt_tokens_total == 6, "prompt tokens count once, however often they are recomputed"


def test_decodes_go_on_while_a_long_prompt_is_prefilled() -> None:
    rig = Rig(num_pages=200, max_sequences=4, max_batch_tokens=8)
    rig.engine.add(request("chat", [1], max_tokens=40))
    rig.step()
    rig.engine.add(request("essay", list(range(50)) * 2, max_tokens=2))
    for step in range(14):
        rig.step()
        assert len(rig.streams.tokens["chat", 0]) == step + 2, "a running stream lost an iteration to a prompt"
    run_to_end(rig.engine, rig.streams)
    assert max(b.num_tokens for b in rig.runner.batches) == 8


@pytest.mark.parametrize(("max_stall_s", "chunks"), [(0.25, [128, 128, 128, 128, 88]), (None, [600])])
def test_a_long_prompt_holds_decodes_up_no_longer_than_it_must(max_stall_s: float | None, chunks: list[int]) -> None:
    rig = Rig(num_pages=300, page_tokens=16, max_batch_tokens=1024, token_seconds=1e-3, max_stall_s=max_stall_s)
    rig.engine.add(request("alone", [n % 90 for n in range(2048)], max_tokens=30))
    rig.step()
    rig.step()
    assert [batch.num_tokens for batch in rig.runner.batches] == [1024, 1024], "nobody waits for these"
    rig.engine.add(request("late", [90 - n % 80 for n in range(600)], max_tokens=1))
    run_to_end(rig.engine, rig.streams)
    beside = [batch.num_tokens - 1 for batch in rig.runner.batches[2:] if batch.num_tokens > 1]
    assert beside == chunks


def test_nobody_waits_for_a_long_prompt_while_it_is_not_known_how_long_that_takes() -> None:
    rig = Rig(num_pages=300, page_tokens=16, max_batch_tokens=1024, token_seconds=1e-3)
    rig.engine.add(request("decodes", [1], max_tokens=30))
    rig.step()
    rig.engine.add(request("late", [90 - n % 80 for n in range(600)], max_tokens=1))
    run_to_end(rig.engine, rig.streams)
    beside = [batch.num_tokens - 1 for batch in rig.runner.batches[1:] if batch.num_tokens > 1]
    assert beside == [128, 128, 128, 128, 88]


def test_a_late_joiner_waits_at_most_one_iteration() -> None:
    rig = Rig(num_pages=200)
    rig.engine.add(request("first", [1, 2], max_tokens=50))
    rig.step()
    rig.engine.add(request("second", [3, 4], max_tokens=5))
    rig.step()
    assert rig.streams.tokens["second", 0], "the newcomer was not in the next iteration"


def test_finished_sequences_leave_at_once() -> None:
    rig = Rig(num_pages=8, page_tokens=4, max_sequences=1)
    rig.engine.add(request("a", [1], max_tokens=2))
    rig.engine.add(request("b", [2], max_tokens=2))
    rig.step()
    rig.step()
    assert ("a", 0) in rig.streams.finished
    assert rig.pool.num_free == 8
    rig.step()
    assert ("b", 0) in rig.streams.tokens


def test_samples_share_the_prompts_full_pages() -> None:
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=100)
    prompt = list(range(18))
    rig.engine.add(request("r", prompt, n=5, max_tokens=3))
    rig.step()
    rig.step()
    shared = 4  # 17 tokens besides the last fill four pages
    assert 100 - rig.pool.num_free == shared + 5 * 1
    assert rig.runner.batches[1].num_tokens == 1 + 4 * 2, "a sample recomputes only the partly filled page"
    streams = run_to_end(rig.engine, rig.streams)
    assert {i: streams.tokens["r", i] for i in range(5)} == {i: expected(prompt, 3, 0, i) for i in range(5)}
    assert rig.engine.stats().prompt_tokens_total == 18
    rig.check_nothing_left()


def test_samples_begin_together_though_other_prompts_wait_behind_theirs() -> None:
    rig = Rig(num_pages=200, page_tokens=4, max_batch_tokens=16)
    rig.engine.add(request("r", list(range(30)), n=3, max_tokens=20))
    for first, name in enumerate(("next", "last"), 90):
        rig.engine.add(request(name, [first, *range(80)], max_tokens=2))
    while len(rig.streams.tokens) < 3:
        rig.step()
    assert list(rig.streams.tokens) == [("r", 0), ("r", 1), ("r", 2)]
    assert len(rig.streams.tokens["r", 0]) == 2, "the others begin in the iteration after the first"
    run_to_end(rig.engine, rig.streams)
    rig.check_nothing_left()


def test_higher_priority_goes_before_the_rest_of_a_prompt_that_runs() -> None:
    rig = Rig(num_pages=100, page_tokens=4, max_batch_tokens=16)
    rig.engine.add(request("essay", list(range(90)), max_tokens=2))
    rig.step()
    rig.engine.add(request("urgent", [5] * 10, max_tokens=2, priority=-1))
    rig.step()
    assert list(rig.streams.tokens) == [("urgent", 0)]
    run_to_end(rig.engine, rig.streams)
    rig.check_nothing_left()


def test_higher_priority_is_admitted_first_and_keeps_its_pages() -> None:
    rig = Rig(num_pages=8, page_tokens=2, max_sequences=1)
    rig.engine.add(request("running", [1], max_tokens=3))
    rig.step()
    rig.engine.add(request("normal", [2], max_tokens=3))
    rig.engine.add(request("urgent", [3], max_tokens=3, priority=-1))
    streams = run_to_end(rig.engine, rig.streams)
    assert [name for name, _ in streams.finished] == ["running", "urgent", "normal"]


def test_stop_tokens_end_a_stream_and_min_tokens_bans_them() -> None:
    prompt = [5, 6, 7]
    first, second, third = expected(prompt, 3)
    rig = Rig(eos=(second,))
    rig.engine.add(request("eos", prompt, max_tokens=10))
    rig.engine.add(request("ignored", prompt, max_tokens=3, ignore_eos=True))
    rig.engine.add(request("own", prompt, max_tokens=10, ignore_eos=True, stop_token_ids=(third,)))
    rig.engine.add(request("least", prompt, max_tokens=2, min_tokens=1, stop_token_ids=(first,)))
    streams = run_to_end(rig.engine)
    assert streams.tokens["eos", 0] == [first, second]
    assert streams.finished["eos", 0].stop_token_id == second
    assert streams.finished["ignored", 0].finish_reason is FinishReason.LENGTH
    assert streams.tokens["own", 0] == [first, second, third]
    banned = [[set(edit.banned.tolist()) for edit in batch.samples.edits.values()] for batch in rig.runner.batches]
    assert banned[:2] == [[{first, second}], []], "stop tokens are banned until min_tokens are out, and not after"
    assert not any(banned[2:])


def test_a_row_that_fails_does_not_disturb_its_neighbours() -> None:
    rig = Rig(poison=96)
    rig.engine.add(request("bad", [96], max_tokens=4))
    rig.engine.add(request("good", [1, 2], max_tokens=4))
    streams = run_to_end(rig.engine)
    assert streams.finished["bad", 0].finish_reason is FinishReason.ERROR
    assert streams.finished["bad", 0].error == "poisoned"
    assert streams.tokens["good", 0] == expected([1, 2], 4)
    rig.check_nothing_left()


@settings(max_examples=60)
@given(length=st.integers(1, 30), budget=st.integers(1, 16), num_pages=st.integers(9, 20))
def test_prompt_logprobs_come_once_per_token_whatever_the_chunks(length: int, budget: int, num_pages: int) -> None:
    rig = Rig(num_pages=num_pages, page_tokens=4, max_sequences=1, max_batch_tokens=budget)
    prompt = [(3 * i) % VOCAB for i in range(length)]
    rig.engine.add(request("r", prompt, n=2, max_tokens=3, prompt_logprobs=0))
    streams = run_to_end(rig.engine)
    assert [p.token_id for p in streams.prompt_logprobs["r", 0]] == prompt[1:]
    assert not streams.prompt_logprobs["r", 1]


def test_prompt_logprobs_are_not_repeated_after_preemption() -> None:
    rig = Rig(num_pages=10, page_tokens=2, max_sequences=2, max_batch_tokens=3)
    rig.engine.add(request("early", [1, 2], max_tokens=15))
    rig.engine.add(request("late", list(range(10)), max_tokens=6, prompt_logprobs=0))
    streams = run_to_end(rig.engine)
    assert rig.engine.stats().preemptions_total > 0
    assert [p.token_id for p in streams.prompt_logprobs["late", 0]] == list(range(1, 10))


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([VOCAB], {}, "prompt"),
        ([1], {"max_tokens": 256}, "max_tokens"),
        ([1] * 256, {}, "prompt"),
        ([1], {"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ([1], {"allowed_token_ids": (VOCAB + 5,)}, "allowed_token_ids"),
        ([1], {"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    ],
)
def test_impossible_requests_are_refused_by_name_and_leave_no_trace(prompt: list, params: dict, param: str) -> None:
    rig = Rig()
    with pytest.raises(InvalidRequest) as caught:
        rig.engine.add(request("r", prompt, **params))
    assert caught.value.param == param
    assert not rig.engine.has_work()


def test_aborting_what_is_unknown_or_finished_is_harmless() -> None:
    rig = Rig()
    rig.engine.abort("never heard of")
    rig.engine.add(request("r", [1], max_tokens=1))
    run_to_end(rig.engine)
    rig.engine.abort("r")
    rig.check_nothing_left()
