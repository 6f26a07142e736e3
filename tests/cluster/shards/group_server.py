"""Groups of fake ranks on a private Ray: `python -m tests.cluster.shards.group_server TEMP_DIR CPUS...`.

A process of its own, because Ray reads its settings once, when it is imported. There is a node for each number of CPUs.
Each line of standard input is a JSON object: what to do, with its arguments; a line of output answers it. It ends when
the input does.
"""

import asyncio
import itertools
import json
import os
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

APPLICATION = "app"
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
}


class Server:
    def __init__(self) -> None:
        self._group: Any = None
        self._engine: Any = None
        self._names = itertools.count()
        self._hosts: list[Any] = []

    def start(
        self,
        name: str = "",
        model: str = "fake",
        cpus: float = 1.0,
        kv_hosts: bool = False,
        loading_silence_s: float = 30.0,
        prepare: str = "",
        starting_s: float = 60.0,
        **parallel: Any,
    ) -> Any:
        """Starts a group and an engine over it; who and where the ranks are. `kv_hosts`: each node has one; `prepare`:
        what their processes begin with, by its name among the fakes."""
        from cluster.config import KVTierConfig, ParallelConfig
        from cluster.kv_host import start_hosts
        from cluster.shard_engine import engine_over
        from cluster.shard_group import GroupOrder, ShardGroup
        from cluster.shards.cut import places_of
        from deployments.sharded import make_rank_tier
        from engine.config import EngineConfig
        from tests.cluster.planner.models import LLAMA2_7B
        from tests.cluster.shards import fake_ranks

        config = ParallelConfig.model_validate(parallel)
        name = name or f"app:{next(self._names)}"
        self._group = ShardGroup(
            GroupOrder(
                name,
                EngineConfig(model=model),
                config,
                places_of(config, replace(LLAMA2_7B, layers=8)),
                fake_ranks.load_fake,
                {"CPU": cpus},
                getattr(fake_ranks, prepare) if prepare else int,
                make_tier=partial(make_rank_tier, APPLICATION, config.ranks, None) if kv_hosts else None,
                loading_silence_s=loading_silence_s,
                starting_s=starting_s,
            )
        )
        if kv_hosts:
            self._hosts = list(start_hosts(APPLICATION, KVTierConfig(memory=2**22)).values())
        self._engine = engine_over(self._group, EngineConfig(model=model), model_path=None)
        return {
            "ranks": [[each.pid, each.node, each.address] for each in self._group._where],
            "doors": [door.work.partition(":")[0] for door in self._group._channel.doors],
            "folder": str(self._group._channel._doors.folder),
            "pages": self._engine.stats().num_pages,
            "max_model_len": self._engine.max_model_len,
        }

    def generate(self, prompts: list[list[int]], max_tokens: int, pause_s: float = 0.0, biased: bool = False) -> Any:
        """The tokens of each prompt, how many batches were in flight at most, and what failed. `pause_s`: before it
        begins; `biased`: the first prompt asks for something of every token's logit."""
        from tests.engine.fakes import VOCAB, Streams
        from tests.engine.rig import request

        time.sleep(pause_s)
        for index, prompt in enumerate(prompts):
            bias = dict.fromkeys(range(VOCAB), 0.0) if biased and not index else None
            self._engine.add(request(str(index), prompt, max_tokens=max_tokens, logit_bias=bias))
        streams, deepest = Streams(), 0
        while self._engine.has_work():
            streams.take(self._engine.step())
            deepest = max(deepest, 1 + len(self._group._uncollected))
        return {
            "tokens": [streams.tokens[str(index), 0] for index in range(len(prompts))],
            "deepest": deepest,
            "failed": {name: each.error for (name, _), each in streams.finished.items() if each.error},
        }

    def bound(self, max_bytes: int) -> Any:
        """Of the messages that this process sends; what it was before."""
        from cluster.shards import fields

        before, fields.MAX_BYTES = fields.MAX_BYTES, max_bytes
        return before

    def build(self, model: str, prompts: list[list[int]], max_tokens: int, **parallel: Any) -> Any:
        """The greedy tokens of an engine over real ranks, which is then closed."""
        from cluster.config import ParallelConfig
        from cluster.shard_engine import build_sharded_engine
        from deployments.sharded import load_rank

        config = ParallelConfig.model_validate(parallel)
        name = f"app:{next(self._names)}"
        engine = build_sharded_engine(
            real_config(model), config, name=name, each={"CPU": 1.0}, load=load_rank, prepare=int, make_tier=None
        )
        try:
            return generate(engine, prompts, max_tokens)
        finally:
            engine.close()

    def home(self) -> Any:
        """The node of this process."""
        from cluster.nodes import this_node

        return this_node()["NodeID"]

    def stats(self) -> Any:
        """Of the engine."""
        return asdict(self._engine.stats())

    def ready(self) -> Any:
        """Whether pages overflow to the hosts of all nodes."""
        self._group.tier.poll(0.1)
        return self._group.tier.host() > 0

    def waited(self) -> Any:
        """For how long each rank had nothing to run, and how many batches it has finished."""
        return [list(self._group.waited_s), list(self._group._channel.finished)]

    def failure(self) -> Any:
        """What is known of a loss without anything being asked of the ranks."""
        return self._group.failure and str(self._group.failure)

    def close(self) -> None:
        from cluster.kv_host import end_hosts

        self._engine.close()
        asyncio.run(end_hosts(time.time_ns(), self._hosts))
        self._hosts = []

    def left(self) -> Any:
        """Actors that live, and placement groups that take something."""
        import ray
        from ray.util.placement_group import placement_group_table
        from ray.util.state import list_actors

        return {
            "actors": sorted(each.name for each in list_actors() if each.state != "DEAD"),
            "places": [each["state"] for each in placement_group_table().values() if each["state"] != "REMOVED"],
            "cpus": ray.available_resources().get("CPU", 0.0),
        }


def real_config(model: str) -> Any:
    """In full precision, so that tokens do not depend on the order of sums."""
    from engine.config import EngineConfig

    return EngineConfig.model_validate(
        {"model": model, "dtype": "float32", "threads": 1, "device": "cpu", "kv": {"memory": "64MiB"}}
    )


def generate(engine: Any, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """The greedy tokens of each prompt."""
    from tests.engine.fakes import run_to_end
    from tests.engine.rig import request

    for index, prompt in enumerate(prompts):
        engine.add(request(str(index), prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True))
    streams = run_to_end(engine)
    return [streams.tokens[str(index), 0] for index in range(len(prompts))]


def answer(server: Server, line: str) -> dict[str, Any]:
    order = json.loads(line)
    began = time.monotonic()
    try:
        result = getattr(server, order.pop("do"))(**order)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "seconds": time.monotonic() - began}
    return {"result": result, "seconds": time.monotonic() - began}


def main(directory: str, *cpus: str) -> None:
    os.environ.update(SETTINGS | {"RAY_TMPDIR": directory})
    # Ray prints what it likes.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    (Path(directory) / "ray").mkdir()
    import ray
    from ray.cluster_utils import Cluster

    from cluster.ports import free_ports

    first, *others = map(int, cpus)
    memory = {"object_store_memory": 100 * 2**20}
    # Whoever lists actors asks the dashboard.
    dashboard = {"include_dashboard": True, "dashboard_port": free_ports(1)[0]}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": first, **dashboard, **memory})
    try:
        for count in others:
            cluster.add_node(num_cpus=count, **memory)
        ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
        print("ready", file=answers, flush=True)
        server = Server()
        for line in sys.stdin:
            print(json.dumps(answer(server, line)), file=answers, flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
