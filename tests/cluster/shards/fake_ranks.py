"""Ranks without a model: each writes tokens where keys and values would be, and all add up a number with every batch.

The sum makes them depend on each other as real ones do: one that is gone breaks its neighbours' connections, and one
that is stopped keeps them waiting. What goes wrong, and where, is written in the name of the model, as JSON. Ranks of a
model that is a directory draw letters of the tokenizer of `tests.deployments.fakes`, at a pace of their own.
"""

import json
import os
import signal
import socket
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch, StepOutput
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.kv.keys import root_key
from engine.parallel.place import Place, RankFacts
from tests.engine.fakes import VOCAB, LedgerRunner

PAGE_TOKENS = 4
NUM_PAGES = 64
"""Of rank 0; each of the others has one less than the one before it."""
MAX_POSITION = 200
LETTERS = range(100, 126)
TOKEN_S = 0.01
"""What a token is said to take: pages are worth loading."""
STEP_S = 0.02
"""What a batch takes the ranks that draw letters."""


@dataclass(frozen=True)
class Trouble:
    """What goes wrong: a rank, and where there are steps, the one at which it does."""

    load: int | None = None
    dies_loading: int | None = None
    stops_loading: int | None = None
    start: int | None = None
    stops_starting: int | None = None
    step: tuple[int, int] | None = None
    dies_at: tuple[int, int] | None = None


class Sum:
    """Numbers of all ranks, added by rank 0."""

    def __init__(self, place: Place, rendezvous: str) -> None:
        host, port = rendezvous.removeprefix("tcp://").rsplit(":", 1)
        self._is_first = place.rank == 0
        self._peers: list[socket.socket] = []
        if self._is_first:
            with socket.create_server((host, int(port))) as server:
                self._peers = [server.accept()[0] for _ in range(place.world - 1)]
        else:
            self._peers = [_connected(host, int(port))]

    def add(self, number: int) -> int:
        if self._is_first:
            total = number + sum(self._read(peer) for peer in self._peers)
            for peer in self._peers:
                peer.sendall(total.to_bytes(8, "little"))
            return total
        self._peers[0].sendall(number.to_bytes(8, "little"))
        return self._read(self._peers[0])

    @staticmethod
    def _read(peer: socket.socket) -> int:
        data = peer.recv(8, socket.MSG_WAITALL)
        if len(data) < 8:
            raise ConnectionError("connection closed by a neighbour")
        return int.from_bytes(data, "little")


def _connected(host: str, port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection((host, port))
        except ConnectionRefusedError:
            continue


class FakeMemory:
    """Pages of tokens as bytes."""

    page_bytes = PAGE_TOKENS * 8

    def __init__(self, runner: LedgerRunner) -> None:
        self._runner = runner

    def read(self, page: int, target: NDArray[np.uint8]) -> None:
        tokens = [-1 if token is None else token for token in self._runner.page(page)]
        target[:] = np.array(tokens, np.int64).view(np.uint8)

    def write(self, page: int, source: NDArray[np.uint8]) -> None:
        self._runner.fill(page, source.view(np.int64).tolist())


def letter(token: int) -> int:
    """The letter that is drawn in place of a token."""
    return LETTERS[token % len(LETTERS)]


class FakeRunner:
    def __init__(self, place: Place, num_pages: int, total: Sum, trouble: Trouble, *, letters: bool) -> None:
        self.waited_s = 0.0
        self._letters = letters
        self._place = place
        self._total = total
        self._trouble = trouble
        self._runner = LedgerRunner(num_pages, PAGE_TOKENS, token_seconds=TOKEN_S)
        self.memory = FakeMemory(self._runner)

    def run(self, batch: Batch) -> StepOutput | None:
        here = (self._place.rank, batch.step)
        if self._trouble.step == here:
            raise MemoryError("no memory for the activations")
        if self._trouble.dies_at == here:
            os._exit(7)
        world = self._place.world
        total = self._total.add(batch.step * (self._place.rank + 1))
        assert total == batch.step * world * (world + 1) // 2, "the ranks run different batches"
        output = self._runner.run(batch)
        if self._letters:
            time.sleep(STEP_S)
            output = replace(output, token_ids=[letter(token) for token in output.token_ids])
        return output if self._place.answers else None

    def close(self) -> None:
        pass


class FakeLoaded:
    def __init__(self, place: Place, total: Sum, trouble: Trouble, *, letters: bool) -> None:
        self._letters = letters
        self._place = place
        self._total = total
        self._trouble = trouble
        self.facts = RankFacts(
            num_pages=NUM_PAGES - place.rank,
            page_tokens=PAGE_TOKENS,
            page_bytes=FakeMemory.page_bytes,
            weight_bytes=1000,
            max_position=MAX_POSITION,
            vocab_size=257 if letters else VOCAB,
            eos_token_ids=(),
            namespace=root_key(f"fake rank {place.rank} of {place.world}"),
        )

    def start(self, num_pages: int) -> FakeRunner:
        if self._trouble.start == self._place.rank:
            raise MemoryError("no memory for the pages")
        if self._trouble.stops_starting == self._place.rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        assert num_pages <= self.facts.num_pages
        return FakeRunner(self._place, num_pages, self._total, self._trouble, letters=self._letters)


def prepare_in_vain() -> None:
    """The first thing that a process does goes wrong, as where its node lacks what it imports."""
    raise ModuleNotFoundError("No module named 'cluster'")


def never_be_prepared() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def load_fake(config: EngineConfig, place: Place, rendezvous: str) -> FakeLoaded:
    """Loads nothing, with what `config.model` says of trouble."""
    given: dict[str, Any] = json.loads(config.model) if config.model.startswith("{") else {}
    trouble = Trouble(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
    if trouble.load == place.rank:
        raise ModelError("weights.safetensors: layer 3 is missing")
    if trouble.dies_loading == place.rank:
        os._exit(7)
    if trouble.stops_loading == place.rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    return FakeLoaded(place, Sum(place, rendezvous), trouble, letters=config.model.startswith("/"))
