"""Engines over one KV host for measurements, and a closed loop of clients that drives one of them.

The host is a process of its own, as in a cluster; the engines run in this one.
"""

import select
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import engine  # noqa: F401  (before torch: it bounds how long threads spin)
from cluster.kv.client import UNLIMITED, Bandwidth, TierClient
from engine.build import assemble
from engine.config import EngineConfig, KVConfig, SchedulerConfig
from engine.engine import Engine
from engine.kv.costs import LoadPolicy, choose_load
from engine.kv.tier import PageMemory
from engine.sampling_params import SamplingParams
from engine.sequence import Request

START_TIMEOUT_S = 30.0


@contextmanager
def kv_host(memory: int) -> Iterator[Path]:
    """A host with so many bytes of memory and no disk; the path of its socket."""
    with tempfile.TemporaryDirectory(prefix="manta-bench-kv-") as folder:
        command = [sys.executable, "-m", "cluster.kv.server", "--directory", folder, "--memory", str(memory)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], START_TIMEOUT_S)
            if not ready or not process.stdout.readline():
                raise RuntimeError(f"the KV host did not start within {START_TIMEOUT_S:.0f} s")
            yield Path(folder) / "kv.sock"
        finally:
            process.terminate()
            process.wait(START_TIMEOUT_S)


def tiered_engine(
    model: Path,
    *,
    kv_bytes: int,
    threads: int,
    host: Path | None,
    max_sequences: int = 32,
    bandwidth: Bandwidth = UNLIMITED,
    choose: LoadPolicy = choose_load,
) -> Engine:
    """An engine with so much memory for pages; where a host is given, one that is connected to it."""
    clients: list[TierClient] = []

    def make_tier(layout: bytes, memory: PageMemory) -> TierClient:
        client = TierClient(
            lambda: host,
            layout,
            memory,
            name="benchmark",
            bandwidth=bandwidth,
            choose=choose,
        )
        clients.append(client)
        return client

    config = EngineConfig(
        model=str(model),
        device="cpu",
        threads=threads,
        kv=KVConfig(memory=kv_bytes),
        scheduler=SchedulerConfig(max_sequences=max_sequences, max_batch_tokens=1024),
    )
    made = assemble(config, None if host is None else make_tier).engine
    deadline = time.monotonic() + START_TIMEOUT_S
    while clients and not clients[0].connected:
        if time.monotonic() > deadline:
            raise RuntimeError("the KV host does not take the engine")
        time.sleep(0.01)
    return made


def request(name: str, prompt: list[int], output_tokens: int, salt: str) -> Request:
    """Greedy, of exactly so many tokens; found in caches under its salt only."""
    params = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
    return Request(name, tuple(prompt), params, cache_salt=salt)


def first_token_seconds(made: Engine, ask: Request) -> tuple[float, list[int]]:
    """Runs one request alone; seconds to its first token, and its tokens."""
    begin = time.perf_counter()
    made.add(ask)
    first = 0.0
    tokens: list[int] = []
    while made.has_work():
        for emission in made.step():
            if emission.token_ids and not tokens:
                first = time.perf_counter() - begin
            tokens += emission.token_ids
    return first, tokens


class Conversation:
    """Turns of one client: each prompt is everything said before, and something new."""

    def __init__(self, name: str, openings: list[list[int]], output_tokens: list[int]) -> None:
        self.name = name
        self._openings = deque(openings)
        self._output_tokens = deque(output_tokens)
        self.tokens: list[int] = []
        self.asked = 0

    @property
    def over(self) -> bool:
        return not self._openings

    def ask(self, salt: str) -> Request:
        self.tokens += self._openings.popleft()
        self.asked += 1
        return request(f"{self.name}.{self.asked}", self.tokens, self._output_tokens.popleft(), salt)


def converse(
    made: Engine, conversations: list[Conversation], clients: int, salt: str, clock: Callable[[], float]
) -> tuple[float, int]:
    """All turns, at most `clients` requests at once, conversation after conversation in turns; seconds and tokens out.

    A conversation's next turn comes after the present one of all others: its pages have had time to be overwritten.
    """
    waiting = deque(conversations)
    running: dict[str, Conversation] = {}
    begin, produced = clock(), 0
    while waiting or running:
        while waiting and len(running) < clients:
            conversation = waiting.popleft()
            ask = conversation.ask(salt)
            running[ask.request_id] = conversation
            made.add(ask)
        for emission in made.step():
            conversation = running[emission.request_id]
            conversation.tokens += emission.token_ids
            produced += len(emission.token_ids)
            if emission.finish_reason is not None:
                del running[emission.request_id]
                if not conversation.over:
                    waiting.append(conversation)
    return clock() - begin, produced
