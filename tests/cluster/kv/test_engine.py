"""The real engine over a real KV host: what is loaded is what would have been computed."""

import signal
from collections.abc import Callable, Iterator

import pytest

from cluster.kv.client import TierClient
from engine.build import build_engine
from engine.config import EngineConfig, KVConfig, SchedulerConfig
from engine.engine import Engine
from engine.kv.tier import PageMemory, Tier
from engine.sampling_params import SamplingParams
from engine.sequence import Request
from tests.cluster.kv.hosts import Host, eventually
from tests.compiled import compiled_library

Answers = dict[tuple[str, int], tuple[list[int], list[float]]]
PROMPT = [5 + 3 * place % 90 for place in range(150)]


class Replica:
    """An engine with what a test wants to look at."""

    def __init__(self, host: Host | None, memory: str, *, model: str = "manta-tiny") -> None:
        compiled_library()
        self.clients: list[TierClient] = []

        def make_tier(layout: bytes, pages: PageMemory) -> Tier:
            assert host is not None
            self.clients.append(TierClient(lambda: host.socket, layout, pages, name="test"))
            return self.clients[-1]

        config = EngineConfig(
            model=model,
            device="cpu",
            deterministic=True,
            max_model_len=256,
            kv=KVConfig(memory=memory),
            scheduler=SchedulerConfig(max_sequences=16, max_batch_tokens=64),
        )
        self.engine: Engine = build_engine(config, None if host is None else make_tier)
        if host is not None:
            eventually(lambda: self.clients[0].connected)

    def answer(self, *requests: Request, disturb: Callable[[int], None] = lambda step: None) -> Answers:
        """Tokens and logprobs by request and sample; `disturb` is called before each step."""
        for request in requests:
            self.engine.add(request)
        answers: Answers = {}
        step = 0
        while self.engine.has_work():
            disturb(step)
            step += 1
            for emission in self.engine.step():
                tokens, logprobs = answers.setdefault((emission.request_id, emission.sample_index), ([], []))
                tokens += emission.token_ids
                logprobs += [each.logprob for each in emission.logprobs]
        return answers


@pytest.fixture
def replica() -> Iterator[Callable[..., Replica]]:
    made: list[Replica] = []

    def make(*args: object, **kwargs: object) -> Replica:
        made.append(Replica(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.engine.close()


def ask(name: str, prompt: list[int], *, salt: str | None = None, **params: object) -> Request:
    settings = {"max_tokens": 40, "temperature": 0.0, "logprobs": 0, "ignore_eos": True, **params}
    return Request(name, tuple(prompt), SamplingParams(**settings), cache_salt=salt)


def crowd() -> list[Request]:
    """More than a small pool holds: prompts that share beginnings, greedy, drawn, and of two samples."""
    return [
        ask(
            str(number),
            PROMPT[: 60 + 20 * (number % 3)] + [number] * 10,
            n=1 + number % 2,
            temperature=number % 2,
            seed=number,
        )
        for number in range(8)
    ]


def test_another_replica_goes_on_from_pages_bit_by_bit(host: Host, replica: Callable[..., Replica]) -> None:
    host.start("64MiB")
    first, second, alone = replica(host, "8MiB"), replica(host, "8MiB"), replica(None, "8MiB")
    wanted = alone.answer(ask("x", PROMPT))
    assert first.answer(ask("x", PROMPT)) == wanted
    given = wanted["x", 0][0][:20]
    resumed = Request("x", tuple(PROMPT), ask("x", PROMPT).params, given=(tuple(given),))
    rest = second.answer(resumed)
    assert rest["x", 0][0] == wanted["x", 0][0][20:]
    assert rest["x", 0][1] == wanted["x", 0][1][20:]
    assert second.engine.stats().tier_pages_loaded_total == (150 + 19) // 16


def test_a_pool_that_overflows_changes_no_token(host: Host, replica: Callable[..., Replica]) -> None:
    host.start("64MiB")
    small, large = replica(host, "1MiB"), replica(None, "16MiB")
    assert small.answer(*crowd()) == large.answer(*crowd())
    stats = small.engine.stats()
    assert stats.preemptions_total > 0
    assert stats.tier_pages_loaded_total > 0
    assert stats.tier_pages_corrupt_total == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_host_that_is_lost_meanwhile_changes_no_token(
    host: Host, replica: Callable[..., Replica], how: signal.Signals
) -> None:
    host.start("64MiB")
    small, large = replica(host, "1MiB"), replica(None, "16MiB")
    wanted = large.answer(*crowd())

    def disturb(step: int) -> None:
        if step == 40:
            host.send(how)

    assert small.answer(*crowd(), disturb=disturb) == wanted


def test_a_host_that_is_started_again_amid_a_stream_has_all_of_it_in_the_end(
    host: Host, replica: Callable[..., Replica]
) -> None:
    host.start("64MiB")
    first, second, alone = replica(host, "8MiB"), replica(host, "8MiB"), replica(None, "8MiB")
    asked = ask("x", PROMPT, max_tokens=100)

    def disturb(step: int) -> None:
        if step == 20:
            host.stop(signal.SIGKILL)
            host.start("64MiB")
            for each in (first, second):
                eventually(lambda each=each: each.clients[0].host() == 2)

    wanted = alone.answer(asked)
    assert first.answer(asked, disturb=disturb) == wanted
    rest = second.answer(Request("x", tuple(PROMPT), asked.params, given=(tuple(wanted["x", 0][0][:99]),)))
    assert rest["x", 0][0] == wanted["x", 0][0][99:]
    assert second.engine.stats().tier_pages_loaded_total == (150 + 98) // 16


def test_salts_are_kept_apart_at_the_host_too(host: Host, replica: Callable[..., Replica]) -> None:
    host.start("64MiB")
    first, second = replica(host, "8MiB"), replica(host, "8MiB")
    first.answer(ask("x", PROMPT, salt="a"))
    second.answer(ask("x", PROMPT, salt="b"))
    assert second.engine.stats().tier_pages_loaded_total == 0
    second.answer(ask("y", PROMPT, salt="a"))
    assert second.engine.stats().tier_pages_loaded_total > 0
