"""One sitting: for each model and number of bits, every engine is started, then their runs alternate.

An engine that is not installed, cannot be started or fails in a measure is recorded with the reason; the others go on.
"""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.bandwidth import read_bandwidth
from benchmarks.peers.engines import ENGINES, OURS, ConversionError, converted, interpreter
from benchmarks.peers.measures import LARGE_PARAMETERS, MEASURES, Measure, agreement, items
from benchmarks.peers.model_facts import ModelFacts
from benchmarks.peers.process import Worker, WorkerError
from benchmarks.workloads import Item

_KV_HEADROOM = 1.25
"""Pages are whole, and a step may be planned before the one before it has freed its own."""
_MIN_KV_BYTES = 2**28


@dataclass(slots=True)
class Entry:
    """What one engine did in one group; every number is from this sitting."""

    engine: str
    format: str
    version: str = ""
    start_seconds: float | None = None
    weight_bytes: int | None = None
    values: dict[str, list[float]] = field(default_factory=dict)
    """Measure -> tokens per second of every run."""
    first_token_seconds: list[float] = field(default_factory=list)
    """Of the prompt that `prefill` measures."""
    agreement: float | None = None
    """Share of the batch's requests whose first token is ours."""
    problem: str | None = None
    """Why the engine, or a measure of it, has no number."""

    def median(self, measure: str) -> float | None:
        """Tokens per second; for "start" its seconds."""
        if measure not in MEASURES:
            return self.start_seconds
        values = self.values.get(measure)
        return statistics.median(values) if values else None


@dataclass(slots=True)
class Group:
    """One model at one number of bits."""

    model: str
    bits: int
    num_parameters: int
    bandwidth: float
    """Bytes per second that the machine read, before and after, the higher of both."""
    entries: list[Entry] = field(default_factory=list)

    @property
    def floor_bytes(self) -> int:
        """The least a token has to read: every weight at its bits, without scales."""
        return self.num_parameters * self.bits // 8

    @property
    def floor_rate(self) -> float:
        """Tokens per second that one stream could have if a token took as long as reading the weights."""
        return self.bandwidth / self.floor_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sitting consists of."""

    engines: tuple[str, ...]
    measures: tuple[str, ...]
    threads: int
    rounds: int
    timeout: float
    """Seconds that a single order to an engine may take."""


def run_group(plan: Plan, model: Path, bits: int, say: Callable[[str], None]) -> Group | None:
    """Measures every engine that has this number of bits, ours among them; None if no engine has."""
    facts = ModelFacts.read(model)
    names = [name for name in plan.engines if bits in ENGINES[name].formats]
    if not names:
        return None
    group = Group(model.name, bits, facts.num_parameters, read_bandwidth(plan.threads))
    group.entries = [Entry(name, ENGINES[name].formats[bits]) for name in names]
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="manta-peers-")))
        workers = {}
        for entry in group.entries:
            say(f"{group.model} {bits} bits  starting {entry.engine}")
            worker = _start(plan, entry, model, bits, facts, logs)
            if worker is not None:
                workers[entry.engine] = stack.enter_context(worker)
            else:
                say(f"{group.model} {bits} bits  {entry.problem}")
        for name in plan.measures:
            if name in MEASURES:
                _measure(plan, group, MEASURES[name], facts, workers, say)
    group.bandwidth = max(group.bandwidth, read_bandwidth(plan.threads))
    return group


def _start(plan: Plan, entry: Entry, model: Path, bits: int, facts: ModelFacts, logs: Path) -> Worker | None:
    """A loaded engine; None, with the entry's problem filled in, if it cannot be had."""
    python = interpreter(entry.engine)
    if python is None:
        entry.problem = f"{entry.engine} is not installed: run python -m benchmarks.peers.install {entry.engine}"
        return None
    large = facts.is_large(LARGE_PARAMETERS)
    measured = [MEASURES[name].lengths_at(bits, large=large) for name in plan.measures if name in MEASURES]
    lengths = [[sum(pair) for pair in pairs] for pairs in measured if pairs] or [[64]]
    most_tokens = max(sum(each) for each in lengths)
    try:
        load = {
            "model": str(converted(entry.engine, model, entry.format)),
            "format": entry.format,
            "threads": plan.threads,
            # One page more than needed: some engines keep the last token's place free.
            "max_length": max(max(each) for each in lengths) + 16,
            "max_sequences": max(len(each) for each in lengths),
            "kv_bytes": max(_MIN_KV_BYTES, int(_KV_HEADROOM * most_tokens * facts.kv_bytes_per_token)),
        }
        worker = Worker(entry.engine, python, load, log=logs / f"{entry.engine}.log", timeout=plan.timeout)
    except (ConversionError, WorkerError) as error:
        entry.problem = str(error)
        return None
    entry.version, entry.start_seconds, entry.weight_bytes = worker.version, worker.start_seconds, worker.weight_bytes
    return worker


def _measure(
    plan: Plan,
    group: Group,
    measure: Measure,
    facts: ModelFacts,
    workers: dict[str, Worker],
    say: Callable[[str], None],
) -> None:
    """All runs of one measure, the engines by turns; one that fails is closed and leaves `workers`."""
    large = facts.is_large(LARGE_PARAMETERS)
    if not measure.lengths_at(group.bits, large=large):
        return
    for number in range(1, plan.rounds * measure.runs + 1):
        requests = items(measure, large=large, vocab_size=facts.vocab_size, seed=number)
        outputs: dict[str, list[list[int]]] = {}
        for entry in group.entries:
            worker = workers.get(entry.engine)
            if worker is None:
                continue
            where = f"{group.model} {group.bits} bits  {measure.name} run {number}  {entry.engine}"
            try:
                value, outputs[entry.engine] = _one_run(measure, requests, worker, entry)
            except (WorkerError, ValueError) as error:
                entry.problem = f"{measure.name}: {error}"
                say(f"{where} failed: {error}")
                if isinstance(error, WorkerError):
                    workers.pop(entry.engine).close()
            else:
                say(f"{where} {value:.1f} tokens/s")
        if measure.name == "batch" and number == 1:
            _note_agreement(group.entries, outputs)


def _one_run(measure: Measure, requests: Sequence[Item], worker: Worker, entry: Entry) -> tuple[float, list[list[int]]]:
    timeline = worker.run(requests)
    value = measure.value(requests, timeline)
    entry.values.setdefault(measure.name, []).append(value)
    if measure.name == "prefill":
        entry.first_token_seconds.append(max(timeline.first))
    return value, timeline.outputs


def _note_agreement(entries: list[Entry], outputs: dict[str, list[list[int]]]) -> None:
    if OURS not in outputs:
        return
    for entry in entries:
        if entry.engine in outputs and entry.engine != OURS:
            entry.agreement = agreement(outputs[OURS], outputs[entry.engine])
