"""Replicas come and go under streams, as they do in an update; each answer must be what it is when nothing happens.

python -m benchmarks.drain
python -m benchmarks.drain --model manta-tiny --max-tokens 1500

Two replicas, and two changes by the config that `serve deploy` takes: one replica less and, once that is gone, one more
again; and another version of everything, gateways included. Engines are deterministic, as in `benchmarks.chaos`. Each
core is reserved, so that a new replica starts only where an old one has ended. `drained` is the longest time that a
replica which was to go was still there.
"""

import argparse
import asyncio
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks import machine, models
from benchmarks.chaos_client import ask_all
from benchmarks.chaos_streams import PROMPT, Answer, Kind
from benchmarks.start import is_ready
from cluster.ports import free_ports
from deployments.private_ray import PrivateRay

NUM_REPLICAS = 2
SETTLE_TIMEOUT_S = 300.0
_APPLICATION = "default"
_REPLICA = "LLMReplica"
_POLL_S = 0.1
_LEFT = re.compile(r" (\d+) requests leave their replica: (.*)$", re.MULTILINE)
"""What a gateway logs when streams go on elsewhere. Counters would not do: a new version begins them anew."""


@dataclass(frozen=True, slots=True)
class Row:
    """What became of the streams under one change."""

    change: str
    streams: int
    moved: int
    """Times that a stream went on elsewhere because its replica was to go."""
    lost: int
    """The same because it had gone."""
    dropped: int
    mismatches: int
    silence: float
    """Seconds, the longest of all streams."""
    drained: float
    """Seconds."""


class Application:
    """Manta on a Ray of its own, deployed and changed by configs."""

    def __init__(self, model: str) -> None:
        self._ray = PrivateRay(num_cpus=NUM_REPLICAS, dashboard=False)
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self.log_file = self._ray.log_file
        self._args: dict[str, Any] = {"replicas": NUM_REPLICAS, "cpus_per_replica": 1, "served_model_name": "model"}
        self._args["engine"] = {"model": model, "deterministic": True, "scheduler": {"max_batch_tokens": 1024}}
        try:
            self._ray.start("127.0.0.1", port)
            self.deploy(NUM_REPLICAS)
            self.drained()
            with httpx.Client(base_url=self.url) as http:
                while not is_ready(http):
                    time.sleep(_POLL_S)
        except BaseException:
            self._ray.stop()
            raise

    def close(self) -> None:
        self._ray.stop()

    def update(self) -> None:
        """Another version: its iterations take fewer tokens."""
        self._args["engine"]["scheduler"]["max_batch_tokens"] -= 64
        self.deploy(NUM_REPLICAS)

    def deploy(self, num_replicas: int) -> None:
        """Asks for this state of the application, and returns at once."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        application = {
            "name": _APPLICATION,
            "import_path": "deployments.app:build",
            "args": self._args,
            "deployments": [{"name": _REPLICA, "num_replicas": num_replicas}],
        }
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))

    def drained(self) -> float:
        """Waits until the application is as it should be; for how long a replica was about to end meanwhile."""
        from ray import serve

        longest, since = 0.0, None
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while time.monotonic() < deadline:
            application = serve.status().applications[_APPLICATION]
            deployment = application.deployments.get(_REPLICA)
            stopping = deployment is not None and deployment.replica_states.get("STOPPING", 0) > 0
            now = time.monotonic()
            since = (now if since is None else since) if stopping else None
            longest = max(longest, 0.0 if since is None else now - since)
            if application.status == "RUNNING" and not stopping:
                return longest
            if application.status == "DEPLOY_FAILED":
                raise SystemExit(f"the application could not be deployed: {application.message}")
            time.sleep(_POLL_S)
        raise SystemExit(f"the application is not as it should be after {SETTLE_TIMEOUT_S:.0f} s")


def streams(count: int, max_tokens: int) -> list[Kind]:
    body = {"model": "model", "max_tokens": max_tokens, "ignore_eos": True, "stream": True, "temperature": 0.8}
    usage = {"stream_options": {"include_usage": True}}
    return [
        Kind(f"stream {number}", "/v1/completions", {**body, **usage, "prompt": f"{PROMPT} {number}", "seed": number})
        for number in range(count)
    ]


async def under_streams(
    application: Application, asked: Sequence[Kind], delay: float, change: Callable[[], float]
) -> tuple[list[Answer], float]:
    """The answers, with the change made after `delay` seconds, and what it returned."""

    async def make() -> float:
        await asyncio.sleep(delay)
        return await asyncio.to_thread(change)

    answers, drained = await asyncio.gather(ask_all(application.url, asked), make())
    return answers, drained


def run(
    application: Application,
    name: str,
    change: Callable[[], float],
    asked: Sequence[Kind],
    wanted: Sequence[Answer],
    delay: float,
) -> Row:
    """Makes a change under streams."""
    moved_before, lost_before = departures(application.log_file)
    answers, drained = asyncio.run(under_streams(application, asked, delay, change))
    moved, lost = departures(application.log_file)
    dropped = mismatches = 0
    for kind, answer, expected in zip(asked, answers, wanted, strict=True):
        if answer.error is not None:
            dropped += 1
            print(f"{name}: {kind.name}: {answer.error}", flush=True)
        elif (found := answer.difference(expected)) is not None:
            mismatches += 1
            print(f"{name}: {kind.name}: {found}", flush=True)
    silence = max(end - begin for answer in answers for begin, end in pairwise(answer.times))
    return Row(name, len(asked), moved - moved_before, lost - lost_before, dropped, mismatches, silence, drained)


def departures(log: Path) -> tuple[int, int]:
    """How many streams have left a replica that was to go, and how many one that had gone."""
    found = [(int(count), why.endswith("is to go")) for count, why in _LEFT.findall(log.read_text(encoding="utf-8"))]
    return sum(count for count, planned in found if planned), sum(count for count, planned in found if not planned)


def table(rows: Sequence[Row]) -> str:
    counts = f"{'streams':>9}{'moved':>7}{'lost':>6}{'dropped':>9}{'mismatches':>12}"
    lines = [f"{'change':16}{counts}{'silence':>10}{'drained':>10}"]
    for row in rows:
        counts = f"{row.streams:9}{row.moved:7}{row.lost:6}{row.dropped:9}{row.mismatches:12}"
        lines.append(f"{row.change:16}{counts}{row.silence:8.2f} s{row.drained:8.2f} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.drain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="s135m", help=f"{', '.join(models.SHAPES)}, or what manta serve takes")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=1400)
    arguments = parser.parse_args()
    path = str(models.find(arguments.model)) if arguments.model in models.SHAPES else arguments.model
    facts = machine.describe(os.cpu_count() or 1)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    application = Application(path)
    try:
        asked = streams(arguments.streams, arguments.max_tokens)
        begin = time.monotonic()
        wanted = asyncio.run(ask_all(application.url, asked))
        seconds = time.monotonic() - begin
        if (error := next((answer.error for answer in wanted if answer.error), None)) is not None:
            raise SystemExit(f"the server does not answer: {error}")
        print(f"undisturbed: {len(asked)} streams, {seconds:.1f} s", flush=True)

        def fewer_and_more() -> float:
            application.deploy(NUM_REPLICAS - 1)
            drained = application.drained()
            application.deploy(NUM_REPLICAS)
            application.drained()
            return drained

        def update() -> float:
            application.update()
            return application.drained()

        changes = {"2 -> 1 -> 2": fewer_and_more, "new version": update}
        rows = [run(application, name, change, asked, wanted, seconds / 4) for name, change in changes.items()]
    finally:
        application.close()
    print(table(rows))
    if any(row.dropped or row.mismatches for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
