"""An engine over the fake device, and requests whose tokens are known."""

from dataclasses import dataclass, field

from engine.config import SchedulerConfig
from engine.engine import Engine
from engine.kv.pages import PagePool
from engine.limits import Limits
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Request, Sequence
from tests.engine.fake_tier import Contents, FakeTier
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
    prefix_caching: bool = True
    tier: FakeTier | None = None
    namespace: str = ""
    token_seconds: float = 0.0
    max_stall_s: float | None = 0.25
    streams: Streams = field(default_factory=Streams)

    def __post_init__(self) -> None:
        self.pool = PagePool(self.num_pages)
        config = SchedulerConfig(
            max_sequences=self.max_sequences,
            max_batch_tokens=max(self.max_batch_tokens, self.max_sequences),
            max_stall_s=self.max_stall_s,
            admission=self.admission,
        )
        self.scheduler = Scheduler(config, self.pool, self.page_tokens, tier=self.tier, depth=self.depth)
        self.runner = LedgerRunner(self.num_pages, self.page_tokens, self.poison, self.token_seconds)
        if self.tier is not None:
            self.tier.attach(self.runner)
        limits = Limits(self.num_pages * self.page_tokens, VOCAB)
        executor = PipelinedExecutor(self.runner, self.depth)
        self.engine = Engine(
            self.scheduler,
            executor,
            limits,
            eos_token_ids=self.eos,
            prefix_caching=self.prefix_caching,
            namespace=self.namespace,
        )

    def step(self) -> None:
        self.streams.take(self.engine.step())
        self.check()

    def check(self) -> None:
        """What must hold between any two steps."""
        scheduler = self.scheduler
        unfinished = unfinished_of(scheduler)
        check_pages(scheduler)
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


def unfinished_of(scheduler: Scheduler) -> list[Sequence]:
    return [s for samples in scheduler._sequences.values() for s in samples if s.status.value != "finished"]


def check_pages(scheduler: Scheduler) -> None:
    """Every reference to a page is somebody's, and who runs, or is loaded, has a lane of its own."""
    in_flight = {id(s): s for layout in scheduler._in_flight for s in layout.sequences}
    in_flight |= {id(load.sequence): load.sequence for load in scheduler.offload._loading.values()}
    holders = {id(s): s for s in unfinished_of(scheduler)} | in_flight
    scheduler.pool.check_integrity([*(s.pages for s in holders.values()), scheduler.offload.held_pages])
    lanes = [s.lane for s in holders.values() if s.lane >= 0]
    assert len(set(lanes)) == len(lanes) == scheduler._lanes.num_taken
    assert all(s.lane >= 0 for s in [*scheduler.running, *in_flight.values()])


def request(name: str, prompt: list[int], *, priority: int = 0, salt: str | None = None, **params: object) -> Request:
    params.setdefault("seed", 0)
    return Request(name, tuple(prompt), SamplingParams(**params), priority, salt)


def expected(prompt: list[int], count: int, seed: int = 0, sample_index: int = 0) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed, sample_index))
    return tokens[len(prompt) :]


def left_behind(*requests: Request) -> Contents:
    """What a tier has of requests that another engine has run."""
    contents: Contents = {}
    rig = Rig(num_pages=400, page_tokens=4, max_batch_tokens=200, tier=FakeTier(contents))
    for each in requests:
        rig.engine.add(each)
    run_to_end(rig.engine, rig.streams)
    return contents
