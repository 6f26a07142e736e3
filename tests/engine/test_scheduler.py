"""The scheduler against a fake device, under random arrivals, lengths, aborts, priorities and tiny pools."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import SchedulerConfig
from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.kv.pages import PagePool
from engine.limits import Limits
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import FinishReason, Request
from tests.engine.fakes import VOCAB, LedgerRunner, PipelinedExecutor, Streams, next_token, run_to_end


@dataclass
class Rig:
    """An engine over the fake device, with everything a test wants to look at."""

    num_pages: int = 64
    page_tokens: int = 4
    max_sequences: int = 8
    max_batch_tokens: int = 16
    admission: str = "optimistic"
    depth: int = 1
    eos: tuple[int, ...] = ()
    poison: int | None = None
    streams: Streams = field(default_factory=Streams)

    def __post_init__(self) -> None:
        self.pool = PagePool(self.num_pages)
        config = SchedulerConfig(
            max_sequences=self.max_sequences,
            max_batch_tokens=max(self.max_batch_tokens, self.max_sequences),
            admission=self.admission,
        )
        self.scheduler = Scheduler(config, self.pool, self.page_tokens)
        self.runner = LedgerRunner(self.num_pages, self.page_tokens, self.poison)
        limits = Limits(self.num_pages * self.page_tokens, VOCAB)
        executor = PipelinedExecutor(self.runner, self.depth)
        self.engine = Engine(self.scheduler, executor, limits, eos_token_ids=self.eos)

    def step(self) -> None:
        self.streams.take(self.engine.step())
        self.check()

    def check(self) -> None:
        """What must hold between any two steps."""
        scheduler = self.scheduler
        unfinished = [s for samples in scheduler._sequences.values() for s in samples if s.status.value != "finished"]
        in_flight = {id(s): s for layout in scheduler._in_flight for s in layout.sequences}
        holders = {id(s): s for s in unfinished} | in_flight
        self.pool.check_integrity(s.pages for s in holders.values())
        lanes = [s.lane for s in holders.values() if s.lane >= 0]
        assert len(set(lanes)) == len(lanes) == scheduler._lanes.num_taken
        assert all(s.lane >= 0 for s in [*scheduler.running, *in_flight.values()])
        assert len(scheduler.running) <= self.max_sequences
        assert scheduler.running == sorted(scheduler.running, key=lambda s: s.order)
        assert scheduler.waiting == sorted(scheduler.waiting, key=lambda s: s.order)
        stats = self.engine.stats()
        assert stats.num_outstanding_tokens == sum(s.num_outstanding for s in unfinished)
        assert scheduler._reserved == sum(scheduler._pages_at_most(s) for s in scheduler.running)
        assert stats.num_running + stats.num_waiting == len(unfinished)
        if self.admission == "reserve":
            assert stats.preemptions_total == 0
            assert scheduler._reserved <= self.num_pages

    def check_nothing_left(self) -> None:
        assert self.pool.num_free == self.num_pages
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_outstanding_tokens) == (0, 0, 0)
        assert not self.scheduler._sequences
        assert not self.scheduler._siblings


def request(name: str, prompt: list[int], *, priority: int = 0, **params: object) -> Request:
    params.setdefault("seed", 0)
    return Request(name, tuple(prompt), SamplingParams(**params), priority)


def expected(prompt: list[int], count: int, seed: int = 0, sample_index: int = 0) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed, sample_index))
    return tokens[len(prompt) :]


arrivals = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt tokens
        st.integers(1, 20),  # max_tokens
        st.integers(1, 4),  # n
        st.integers(-1, 1),  # priority
        st.integers(0, 5),  # steps before the next arrival
        st.one_of(st.none(), st.none(), st.integers(0, 12)),  # abort after so many steps
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=300, deadline=None)
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

    for number, (length, max_tokens, n, priority, gap, abort_after) in enumerate(arrivals):
        name, prompt = f"r{number}", [(number * 7 + i) % VOCAB for i in range(length)]
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


@settings(max_examples=150, deadline=None)
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
    for number, (length, max_tokens, _, priority, gap, _) in enumerate(arrivals):
        rig.engine.add(request(f"r{number}", [number] * length, max_tokens=max_tokens, priority=priority))
        for _ in range(gap):
            rig.step()
            for level in (-1, 0, 1):
                running = [s.order for s in rig.scheduler.running if s.order.priority == level]
                waiting = [s.order for s in rig.scheduler.waiting if s.order.priority == level]
                assert not running or not waiting or max(running) < min(waiting)
    run_to_end(rig.engine, rig.streams)
    rig.check_nothing_left()


@settings(max_examples=100, deadline=None)
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


@settings(max_examples=60, deadline=None)
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
