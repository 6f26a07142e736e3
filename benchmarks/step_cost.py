"""What an iteration costs besides kernels and matrix products: microseconds a step by part, and of sampling.

    python -m benchmarks.step_cost --sequences 1,32,256

The engine is whole but for the model: a stand-in returns logits that are there already, of a vocabulary so small that
finding the best is free. Every sequence decodes greedily; with `--churn` a share of the batch ends and is replaced in
each step. With `--cold` the stand-in reads through that many MiB, which no part is charged for: weights leave the same
caches behind, and Python is then several times slower. Medians over the steps.
"""

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import machine
from engine.batch import Batch, SampleRow, Samples, StepOutput
from engine.config import SchedulerConfig
from engine.engine import Engine
from engine.executor import LocalExecutor
from engine.kernels.cpu.compiler import load_library
from engine.kernels.cpu.vocabulary import CpuReductions
from engine.kernels.operators import AttentionLayout, Wanted
from engine.kv.pages import PagePool
from engine.limits import Limits
from engine.runner import Runner
from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Emission, Request

PAGE_TOKENS = 16
PROMPT_TOKENS = 100
VOCABULARY = 64
THREADS = 2
SHAPES = ((256, 4096), (32, 49152))
"""Rows and vocabulary of the sampling measurements: the built-in model's, and that of a common tokenizer."""
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.1": {"min_p": 0.1},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
    "logprobs 5": {"temperature": 0.0, "logprobs": 5},
    "half greedy": {},
}


class Stopwatch:
    """Seconds of named parts, one entry a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - start)

    def microseconds(self, name: str) -> float:
        return statistics.median(self.seconds[name]) * 1e6


class NoModel:
    """A forward pass that only reads memory. The sequences go on for ever: the best token is no stop token."""

    device = torch.device("cpu")

    def __init__(self, rows: int, watch: Stopwatch, cold_bytes: int) -> None:
        self._hidden = torch.zeros(1, 1)
        self._logits = torch.zeros(rows, VOCABULARY)
        self._watch = watch
        self._weights = bytearray(cold_bytes)

    def hidden(self, token_ids: Tensor, layout: AttentionLayout, wanted: Wanted | None = None) -> Tensor:
        with self._watch.part("model"):
            self._weights.find(1)
        return self._hidden

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        return self._logits[: len(rows)]

    def wait(self) -> None:
        pass


class TimedScheduler(Scheduler):
    """Notes how long its decisions take."""

    watch: Stopwatch

    def plan(self) -> Batch | None:
        with self.watch.part("plan"):
            return super().plan()

    def commit(self, output: StepOutput) -> list[Emission]:
        with self.watch.part("commit"):
            return super().commit(output)


class TimedRunner:
    """Notes how long the host works around the model."""

    def __init__(self, runner: Runner, watch: Stopwatch) -> None:
        self._runner = runner
        self._watch = watch

    def run(self, batch: Batch) -> StepOutput:
        with self._watch.part("runner"):
            return self._runner.run(batch)


@dataclass(slots=True)
class StepCost:
    """Median microseconds of one iteration."""

    sequences: int
    plan: float
    """Deciding, and laying the batch out."""
    runner: float
    """Batch to tensors, the greedy choice, tensors to output."""
    commit: float
    """Booking the tokens and making emissions."""
    step: float
    """All of it."""


def measure_steps(
    sequences: int, steps: int, *, churn: float = 0.0, cold_bytes: int = 0, **parameters: Any
) -> StepCost:
    """Decodes `sequences` streams for `steps` iterations; `parameters` are those of the requests."""
    watch, length = Stopwatch(), PROMPT_TOKENS + steps * 2 + PAGE_TOKENS
    pool = PagePool(sequences * -(-length // PAGE_TOKENS))
    config = SchedulerConfig(max_sequences=sequences, max_batch_tokens=max(4096, sequences))
    scheduler = TimedScheduler(config, pool, PAGE_TOKENS)
    scheduler.watch = watch
    runner = Runner(NoModel(sequences, watch, cold_bytes), PAGE_TOKENS, make_sampler())
    engine = Engine(scheduler, LocalExecutor(TimedRunner(runner, watch)), Limits(length, VOCABULARY))
    names = map(str, itertools.count())

    def add(max_tokens: int) -> None:
        params = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True} | parameters)
        engine.add(Request(next(names), tuple(i % VOCABULARY for i in range(PROMPT_TOKENS)), params))

    ends = round(1 / churn) if churn else 0
    for index in range(sequences):
        add(1 + index % ends if ends else length - PROMPT_TOKENS)
    while scheduler.waiting:
        engine.step()
    for _ in range(steps):
        while ends and len(scheduler.running) + len(scheduler.waiting) < sequences:
            add(ends)
        with watch.part("step"):
            engine.step()
    for name in watch.seconds:
        watch.seconds[name] = watch.seconds[name][-steps:]
    for name in ("runner", "step"):
        watch.seconds[name] = [
            whole - model for whole, model in zip(watch.seconds[name], watch.seconds["model"], strict=True)
        ]
    return StepCost(sequences, **{part: watch.microseconds(part) for part in ("plan", "runner", "commit", "step")})


def make_sampler() -> Sampler:
    """As a replica on this machine has it."""
    library = load_library()
    return Sampler() if library is None else Sampler(CpuReductions(library, THREADS))


def measure_sampling(rows: int, vocabulary: int, name: str, repetitions: int, *, flat: bool = False) -> float:
    """Median microseconds of `Sampler.sample`. Logits are as peaked as a trained model's, or `flat`: noise alone."""
    random = np.random.default_rng(1)
    logits = random.normal(size=(rows, vocabulary)).astype(np.float32)
    if not flat:
        peaks = random.integers(0, vocabulary, (rows, 20))
        np.put_along_axis(logits, peaks, random.normal(12, 2, peaks.shape).astype(np.float32), axis=1)
    params = [
        SamplingParams(**({"temperature": 0.8 * (row % 2)} if name == "half greedy" else SAMPLING[name]))
        for row in range(rows)
    ]
    history = tuple(random.integers(0, vocabulary, 500).tolist())
    return _median_microseconds(_sampling(torch.from_numpy(logits), params, history), repetitions)


def _sampling(logits: Tensor, params: list[SamplingParams], history: tuple[int, ...]) -> Callable[[], object]:
    rows = [
        SampleRow(row, each, seed=row, sample_index=0, position=1000, prompt=history, output=history)
        for row, each in enumerate(params)
    ]
    sampler, samples = make_sampler(), Samples.of(rows)
    return lambda: sampler.sample(logits, samples)


def _median_microseconds(call: Callable[[], object], repetitions: int) -> float:
    watch = Stopwatch()
    call()
    for _ in range(repetitions):
        with watch.part(""), torch.inference_mode():
            call()
    return watch.microseconds("")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", default="1,32,256", help="batch sizes")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--churn", type=float, default=0.0, help="share of the batch that ends in each step")
    parser.add_argument("--cold", type=int, default=0, metavar="MIB", help="memory read in each step; 64 is enough")
    parser.add_argument("--no-sampling", action="store_true")
    parser.add_argument("--json", type=Path, help="keep the result here")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    print(f"{'us a step':>12}{'plan':>9}{'runner':>9}{'commit':>9}{'step':>9}{'a sequence':>12}")
    costs = []
    for sequences in map(int, options.sequences.split(",")):
        cost = measure_steps(sequences, options.steps, churn=options.churn, cold_bytes=options.cold * 2**20)
        costs.append(cost)
        parts = (cost.plan, cost.runner, cost.commit, cost.step)
        print(f"{sequences:12}" + "".join(f"{part:9.0f}" for part in parts) + f"{cost.step / sequences:12.2f}")
    sampling: dict[str, float] = {}
    for rows, vocabulary in () if options.no_sampling else SHAPES:
        print(f"\nsampling {rows} rows of {vocabulary}, ms: like a trained model's, flat")
        for name in SAMPLING:
            both = [measure_sampling(rows, vocabulary, name, 15, flat=flat) for flat in (False, True)]
            sampling |= {f"{name} {rows} {vocabulary} {kind}": us for kind, us in zip(("", "flat"), both, strict=True)}
            print(f"{name:>12}" + "".join(f"{us / 1000:9.2f}" for us in both))
    if options.json:
        result = {"machine": machine.describe(THREADS), "steps": [asdict(c) for c in costs], "sampling_us": sampling}
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
