"""Groups of ranks on a Ray of the benchmark's own, and engines over them; what each rank needs in memory and in time.

Ray reads its settings when it is imported, and so it is only once `own_ray` has set them.
"""

import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import processes
from cluster.config import ParallelConfig
from engine.batch import Batch, StepOutput
from engine.config import EngineConfig, KVConfig, SchedulerConfig
from engine.engine import Engine
from engine.parallel.place import Place
from engine.parallel.slices import TensorRank

if TYPE_CHECKING:
    from cluster.shard import LoadedRank
    from cluster.shard_group import ShardGroup

_TREE = Path(__file__).resolve().parents[1]
_SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(_TREE), os.environ.get("PYTHONPATH")])),
}
_OBJECT_STORE_BYTES = 100 * 2**20


@contextmanager
def own_ray(num_cpus: int) -> Iterator[None]:
    """A Ray of one node, on the loopback interface, whose files are gone at the end."""
    os.environ.update(_SETTINGS)
    import ray

    with tempfile.TemporaryDirectory(prefix="manta-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        ray.init(
            num_cpus=num_cpus,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            _node_ip_address="127.0.0.1",
            _temp_dir=directory,
        )
        try:
            yield
        finally:
            ray.shutdown()


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of a rank's process."""

    before: int
    """Resident before it loaded anything, everything imported."""
    weights: int
    """That it holds."""
    loading: int
    """The most that loading them took beyond `before`."""
    pages: int
    """Of keys and values, that sequences were ever given. There are more, which take no memory before that."""
    peak: int
    """The most that was resident at any time after `before` (VmHWM)."""

    @property
    def loading_overhead(self) -> float:
        """What loading took on top of the weights, as a share of them."""
        return self.loading / self.weights - 1

    @property
    def overhead(self) -> float:
        """What it took in the end on top of its share, which is the weights and the pages that sequences were given."""
        return (self.peak - self.before) / (self.weights + self.pages) - 1


def load_noting_memory(folder: str, config: EngineConfig, place: Place, rendezvous: str) -> "LoadedRank":
    """In a rank's process: `engine.parallel.rank.load_rank`, with a note of what it took in `folder`."""
    from engine.parallel.rank import load_rank

    processes.reset_peak_memory()
    before, _ = processes.memory()
    loaded = load_rank(config, place, rendezvous)
    _, peak = processes.memory()
    (Path(folder) / f"rank{place.rank}.json").write_text(json.dumps([before, peak - before]))
    return loaded


class AtDepth:
    """An executor over a group, which itself can have more batches in flight. Counts the tokens that it runs."""

    def __init__(self, group: "ShardGroup", depth: int) -> None:
        assert depth <= group.depth
        self.depth = depth
        self.num_tokens = 0
        """Of all batches that are back."""
        self.num_pages = 0
        """That sequences were ever given: a pool gives pages that never were from the lowest on."""
        self._group = group
        self._tokens: deque[int] = deque()

    @property
    def failure(self) -> Exception | None:
        return self._group.failure

    def submit(self, batch: Batch) -> None:
        self._group.submit(batch)
        self._tokens.append(batch.num_tokens)
        self.num_pages = max(self.num_pages, int(batch.page_table.max(initial=-1)) + 1)

    def collect(self) -> StepOutput:
        output = self._group.collect()
        self.num_tokens += self._tokens.popleft()
        return output

    def close(self) -> None:
        """The group goes on."""


class RankGroup:
    """The ranks of one replica, with a thread each."""

    def __init__(
        self, name: str, path: Path, parallel: ParallelConfig, kv_bytes: int, split: Sequence[int] = (), **config: str
    ) -> None:
        """`kv_bytes` of all ranks together; `split`: layers of each stage, by default those that a replica has."""
        from cluster.shard_group import GroupOrder, ShardGroup
        from cluster.shards.cut import places_of, plan_group
        from engine.models.directory import load_spec

        self._config = EngineConfig(
            model=str(path),
            device="cpu",
            threads=1,
            kv=KVConfig(memory=kv_bytes, prefix_caching=False),
            **config,
        )
        places = cut(parallel, split) if split else places_of(parallel, load_spec(path))
        self.layers = tuple(len(place.layers) for place in places if place.tensor.rank == 0)
        """Of each stage."""
        self._executors: list[AtDepth] = []
        self._notes = tempfile.TemporaryDirectory(prefix="manta-ranks-")
        began = time.perf_counter()
        load = partial(load_noting_memory, self._notes.name)
        self._group = ShardGroup(GroupOrder(name, self._config, parallel, places, load))
        try:
            self._kv = plan_group(self._group.facts, self._config)
            self._group.start(self._kv.num_pages)
        except BaseException:
            self.close()
            raise
        self.seconds = time.perf_counter() - began
        """From the order until the ranks wait for batches."""

    def engine(self, depth: int, sequences: int) -> tuple[Engine, AtDepth]:
        """An engine with so many batches in flight and so many sequences. Only one of a group's may have work."""
        from engine.kv.pages import PagePool
        from engine.limits import Limits
        from engine.scheduler import Scheduler

        facts, executor = self._group.facts[0], AtDepth(self._group, depth)
        self._executors.append(executor)
        # Of a benchmark nobody waits for single tokens.
        config = SchedulerConfig(max_sequences=sequences, max_stall_s=None)
        scheduler = Scheduler(config, PagePool(self._kv.num_pages), facts.page_tokens, depth=depth)
        limits = Limits(self._kv.max_model_len, facts.vocab_size)
        return Engine(scheduler, executor, limits, prefix_caching=False), executor

    @property
    def waited_s(self) -> tuple[float, ...]:
        """See `ShardGroup.waited_s`."""
        return self._group.waited_s

    def memory(self) -> list[RankMemory]:
        """By rank."""
        found = []
        for rank, (where, facts) in enumerate(zip(self._group.where, self._group.facts, strict=True)):
            before, loading = json.loads((Path(self._notes.name) / f"rank{rank}.json").read_text())
            _, peak = processes.memory(where.pid)
            pages = max((each.num_pages for each in self._executors), default=0) * facts.page_bytes
            found.append(RankMemory(before, facts.weight_bytes, loading, pages, peak))
        return found

    def close(self) -> None:
        self._group.close()
        self._notes.cleanup()


def cut(parallel: ParallelConfig, layers: Sequence[int]) -> tuple[Place, ...]:
    """By rank, the places of stages with so many layers each. Raises ValueError where there are not as many stages."""
    if len(layers) != parallel.pipeline:
        raise ValueError(f"{len(layers)} numbers of layers are given for {parallel.pipeline} stages")
    return tuple(
        Place(stage, parallel.pipeline, range(begin, end), TensorRank(rank, parallel.tensor, parallel.expert))
        for stage, (begin, end) in enumerate(pairwise(accumulate(layers, initial=0)))
        for rank in range(parallel.tensor)
    )
