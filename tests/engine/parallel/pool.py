"""Processes that each are one rank, started once for many models; and an executor that drives some of them.

The stand-in for a cluster: batches and outputs go through pipes, everything else is as it is in earnest.
"""

import itertools
import multiprocessing
import socket
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from engine.batch import Batch, StepOutput
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv.pages import PagePool
from engine.limits import Limits
from engine.models.directory import load_spec
from engine.models.source import resolve_model
from engine.parallel.place import Place
from engine.parallel.slices import TensorRank
from engine.scheduler import Scheduler


def serve(pipe: Connection) -> None:
    """What a rank's process does: one rank after the other, until the pipe closes."""
    from engine.parallel.rank import load_rank

    rank: Any = None
    runner: Any = None
    while True:
        try:
            verb, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            if verb == "load":
                rank = load_rank(*arguments)
                answer: Any = (rank.facts, rank.kernels, rank.sums_in_shared_memory)
            elif verb == "start":
                runner, answer = rank.start(*arguments), None
            elif verb == "run":
                answer = runner.run(*arguments)
            elif verb == "waited":
                answer = runner.waited_s
            elif verb == "close":
                if runner is not None:
                    runner.close()
                rank = runner = answer = None
            else:
                answer = arguments[0](*arguments[1:])
        except Exception as error:
            answer = error
        pipe.send(answer)


class RankProcess:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, *message: Any) -> None:
        self.pipe.send(message)

    def answer(self, timeout_s: float = 120.0) -> Any:
        assert self.pipe.poll(timeout_s), "a rank does not answer"
        found = self.pipe.recv()
        if isinstance(found, Exception):
            raise found
        return found


class Pool:
    """Rank processes, started as they are needed."""

    def __init__(self) -> None:
        self.processes: list[RankProcess] = []

    def take(self, count: int) -> list[RankProcess]:
        while len(self.processes) < count:
            self.processes.append(RankProcess())
        return self.processes[:count]

    def load(self, config: EngineConfig, cut: "Cut") -> "Ranks":
        """All ranks of a replica, loaded."""
        places = cut.places(load_spec(resolve_model(config.model)).layers)
        processes = self.take(len(places))
        rendezvous = f"tcp://127.0.0.1:{free_port()}"
        for process, place in zip(processes, places, strict=True):
            process.send("load", config, place, rendezvous)
        loaded = gather(processes)
        return Ranks(config, places, processes, *zip(*loaded, strict=True))

    def close(self) -> None:
        for each in self.processes:
            each.pipe.close()
        for each in self.processes:
            each.process.join(10)
            if each.process.is_alive():
                each.process.kill()


def gather(processes: list[RankProcess]) -> list[Any]:
    """Everybody's answer, whoever fails."""
    answers: list[Any] = []
    errors: list[Exception] = []
    for process in processes:
        try:
            answers.append(process.answer())
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return answers


@dataclass(frozen=True)
class Cut:
    tensor: int = 1
    stages: int = 1
    expert: int = 1

    def places(self, layers: int) -> list[Place]:
        bounds = [index * layers // self.stages for index in range(self.stages + 1)]
        return [
            Place(stage, self.stages, range(*bounds[stage : stage + 2]), TensorRank(rank, self.tensor, self.expert))
            for stage, rank in itertools.product(range(self.stages), range(self.tensor))
        ]

    def __str__(self) -> str:
        return f"tp{self.tensor}-pp{self.stages}" + (f"-ep{self.expert}" if self.expert > 1 else "")


class Ranks:
    """The ranks of one replica."""

    def __init__(
        self,
        config: EngineConfig,
        places: list[Place],
        processes: list[RankProcess],
        facts: tuple[Any, ...],
        kernels: tuple[str, ...],
        shared: tuple[bool, ...],
    ) -> None:
        self.config = config
        self.places = places
        self.processes = processes
        self.facts = facts
        self.kernels = kernels
        self.shared = shared

    def start(self, num_pages: int) -> "PoolExecutor":
        for process in self.processes:
            process.send("start", num_pages)
        gather(self.processes)
        return PoolExecutor(self.processes, self.places)

    def engine(self, num_pages: int = 64) -> Engine:
        facts = self.facts[0]
        assert num_pages <= min(each.num_pages for each in self.facts)
        scheduler = Scheduler(self.config.scheduler, PagePool(num_pages), facts.page_tokens)
        limits = Limits(min(facts.max_position, num_pages * facts.page_tokens), facts.vocab_size)
        return Engine(scheduler, self.start(num_pages), limits, eos_token_ids=facts.eos_token_ids)

    def close(self) -> None:
        for process in self.processes:
            process.send("close")
        gather(self.processes)


class PoolExecutor:
    """`Executor` over rank processes."""

    def __init__(self, processes: list[RankProcess], places: list[Place]) -> None:
        self._processes = processes
        self._answering = next(index for index, place in enumerate(places) if place.answers)
        self.depth = places[0].stages
        self._submitted: deque[int] = deque()

    def submit(self, batch: Batch) -> None:
        self._submitted.append(batch.step)
        for process in self._processes:
            process.send("run", batch)

    def collect(self) -> StepOutput:
        answers = gather(self._processes)
        assert [index for index, each in enumerate(answers) if each is not None] == [self._answering]
        output: StepOutput = answers[self._answering]
        assert output.step == self._submitted.popleft()
        return output

    def close(self) -> None: ...


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
