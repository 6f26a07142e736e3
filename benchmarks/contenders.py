"""The engines that are compared offline, each behind the same verb: run a list of requests, all submitted at once.

Each lives in a process of its own that takes orders over a pipe, so that none inherits the other's threads, caches or
memory; while one runs, the others sleep. Heavy imports happen in those processes.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from benchmarks.workloads import Item

if TYPE_CHECKING:
    from engine.engine import Engine

PAD = 2
STATIC_BATCH = 16


@dataclass(frozen=True, slots=True)
class Setup:
    """What every contender is given."""

    model: Path
    threads: int


class Contender(Protocol):
    """A loaded engine."""

    def run(self, items: Sequence[Item]) -> int:
        """Generates every item's output tokens, greedy and past any end-of-sequence; returns how many it was asked for.

        Raises RuntimeError if it brought fewer or more.
        """


class Manta:
    """This engine, as `manta generate` drives it, without text."""

    def __init__(self, setup: Setup) -> None:
        from engine.build import build_engine
        from engine.config import EngineConfig, KVConfig, SchedulerConfig

        # Rounds repeat the same prompts, and are to repeat the same work.
        kv = KVConfig(prefix_caching=False)
        scheduler = SchedulerConfig(max_stall_s=None)
        config = EngineConfig(model=str(setup.model), device="cpu", threads=setup.threads, kv=kv, scheduler=scheduler)
        self._engine = build_engine(config)

    def run(self, items: Sequence[Item]) -> int:
        return run(self._engine, items)


def run(engine: "Engine", items: Sequence[Item]) -> int:
    """See `Contender.run`."""
    return _checked(sum(map(len, generated(engine, items))), items)


def tokens_per_second(engine: "Engine", items: Sequence[Item]) -> float:
    """Output tokens per second of wall time, over one run of the items on an engine of this process."""
    begin = time.perf_counter()
    produced = run(engine, items)
    return produced / (time.perf_counter() - begin)


def generated(engine: "Engine", items: Sequence[Item]) -> list[list[int]]:
    """Each item's output tokens, greedy and past any end-of-sequence."""
    from engine.sampling_params import SamplingParams
    from engine.sequence import Request

    for index, item in enumerate(items):
        params = SamplingParams(max_tokens=item.output_tokens, temperature=0.0, ignore_eos=True)
        engine.add(Request(str(index), item.prompt, params))
    found: list[list[int]] = [[] for _ in items]
    while engine.has_work():
        for emission in engine.step():
            found[int(emission.request_id)].extend(emission.token_ids)
    return found


class TransformersStatic:
    """Hugging Face `generate` on static batches of 16: left padding, an attention mask, all rows to the longest output.

    Only the tokens that were asked for count; those that pad a batch to its longest output do not.
    """

    def __init__(self, setup: Setup) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(setup.threads)
        self._model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.bfloat16)

    def run(self, items: Sequence[Item]) -> int:
        produced = 0
        for begin in range(0, len(items), STATIC_BATCH):
            batch = items[begin : begin + STATIC_BATCH]
            produced += self._generate(batch)
        return _checked(produced, items)

    def _generate(self, batch: Sequence[Item]) -> int:
        import torch

        width = max(len(item.prompt) for item in batch)
        longest = max(item.output_tokens for item in batch)
        token_ids = torch.full((len(batch), width), PAD)
        mask = torch.zeros_like(token_ids)
        for row, item in enumerate(batch):
            token_ids[row, width - len(item.prompt) :] = torch.tensor(item.prompt)
            mask[row, width - len(item.prompt) :] = 1
        output = self._model.generate(
            token_ids, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest, do_sample=False
        )
        if output.shape != (len(batch), width + longest):
            raise RuntimeError(f"generate returned {tuple(output.shape)}, expected {(len(batch), width + longest)}")
        return sum(item.output_tokens for item in batch)


CONTENDERS: dict[str, Callable[[Setup], Contender]] = {"manta": Manta, "transformers": TransformersStatic}


def _checked(produced: int, items: Sequence[Item]) -> int:
    wanted = sum(item.output_tokens for item in items)
    if produced != wanted:
        raise RuntimeError(f"{produced} output tokens, expected {wanted}")
    return produced


class Process:
    """A contender in a process of its own. Raises RuntimeError with the reason if it fails."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_take_orders, args=(theirs, name, setup), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def tokens_per_second(self, items: Sequence[Item]) -> float:
        """Output tokens per second of wall time, over one run of the items."""
        self._pipe.send(list(items))
        produced, seconds = self._answer()
        return produced / seconds

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> tuple[int, float]:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name} died with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer


def _take_orders(pipe: Connection, name: str, setup: Setup) -> None:
    """In the contender's process: loads, warms up, times each list of items that comes. An error goes back as text."""
    try:
        contender = CONTENDERS[name](setup)
        # The first run pays for lazy initialisation, which no later one does.
        contender.run([Item(prompt=tuple(range(3, 35)), output_tokens=4)])
        pipe.send((0, 0.0))
        while True:
            items = pipe.recv()
            begin = time.perf_counter()
            produced = contender.run(items)
            pipe.send((produced, time.perf_counter() - begin))
    except EOFError:
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
