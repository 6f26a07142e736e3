"""Replicas are killed under every kind of request; each answer must be what it is when nothing happens.

python -m benchmarks.chaos --kills 200 --replicas 2
python -m benchmarks.chaos --kills 20 --signal STOP
python -m benchmarks.chaos --kills 20 --model s135m --words 870 --max-tokens 60 --decoding [--no-kv-host]

The server runs with `--deterministic`, so that not even rounding may tell an answer that was cut from one that was not.
Every kill has caches of its own (a salt), so that what one round has computed helps no other. A gap is how much longer
than usual a stream was silent at the kill that cut it. The next kill waits until as many replicas as there should be
have loaded the model, so that a gap tells how soon a death is noticed, and not how long it takes to start a replica.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from benchmarks import machine, models, processes
from benchmarks.chaos_streams import PROMPT, Answer, Kind, ask, kinds, lengthened, salted
from benchmarks.start import is_ready, reachable, wait
from deployments.private_ray import free_ports

ANSWER_TIMEOUT_S = 180.0
_POLL_S = 0.1
_LISTED_S = 1.5
"""From the moment that a replica has loaded the model until every gateway has been told of it."""
_LOADED = re.compile(r"^\S+ INFO replica (\w+): .* pages of \d+ tokens", re.MULTILINE)
"""What a replica logs once it has loaded the model."""


@dataclass(slots=True)
class Row:
    """What became of the requests of one kind."""

    answers: int = 0
    errors: int = 0
    mismatches: int = 0
    gaps: list[float] = field(default_factory=list)


class Server:
    """`manta serve` and the replicas that belong to it."""

    def __init__(self, arguments: Sequence[str], replicas: int, log: Path) -> None:
        (port,) = free_ports(1)
        command = [sys.executable, "-m", "deployments.cli.main", "serve", *arguments, "--port", str(port)]
        command += ["--replicas", str(replicas), "--deterministic"]
        self._num_replicas = replicas
        self._num_killed = 0
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        self.url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=self.url, timeout=ANSWER_TIMEOUT_S) as http:
            wait(lambda: reachable(port) and is_ready(http) and self.complete(), self._process, log)

    def replicas(self) -> list[int]:
        """Process ids."""
        found = []
        for entry in processes.tree(self._process.pid):
            try:
                command = Path(f"/proc/{entry.pid}/cmdline").read_bytes()
            except OSError:
                continue
            if b":LLMReplica" in command:
                found.append(entry.pid)
        return found

    def kill(self, pid: int, how: int) -> None:
        """Sends a signal that ends a replica, or that has it replaced."""
        os.kill(pid, how)
        self._num_killed += 1

    def complete(self) -> bool:
        """Whether as many replicas as there should be have loaded the model.

        By the log: metrics keep those of a dead replica for a while, and a process is there before its model is.
        """
        loaded = set(_LOADED.findall(self._log.read_text(encoding="utf-8", errors="replace")))
        return len(loaded) - self._num_killed == len(self.replicas()) == self._num_replicas

    def close(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)


def _series(http: httpx.Client, name: str) -> list[float]:
    lines = http.get("/metrics").text.splitlines()
    return [float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}(\{{|\s)", line)]


async def ask_all(url: str, asked: Sequence[Kind]) -> list[Answer]:
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_TIMEOUT_S) as http:
        return await asyncio.gather(*(ask(http, kind) for kind in asked))


async def ask_and_kill(
    server: Server, asked: Sequence[Kind], delay: float, victim: int, how: int
) -> tuple[list[Answer], float]:
    """The answers, and the moment of the kill."""

    async def kill() -> float:
        await asyncio.sleep(delay)
        server.kill(victim, how)
        return time.monotonic()

    answers, moment = await asyncio.gather(ask_all(server.url, asked), kill())
    return answers, moment


@dataclass(frozen=True, slots=True)
class Calm:
    """What happens when nothing happens."""

    asked: list[Kind]
    answers: list[Answer]
    begun: float
    """Seconds until every stream has begun."""
    seconds: float
    """Until all answers are complete."""


def undisturbed(url: str, model: str, prompt: str, words: int, max_tokens: int) -> Calm:
    """Asks every kind twice; the answers must agree."""
    greedy = asyncio.run(ask_all(url, lengthened(kinds(model, prompt, max_tokens, "\0")[:1], words)))[0]
    if greedy.error is not None:
        raise SystemExit(f"the server does not answer: {greedy.error}")
    text = greedy.choices[0].text
    asked = lengthened(kinds(model, prompt, max_tokens, text[3 * len(text) // 4 :][:12]), words)
    answers = asyncio.run(ask_all(url, salted(asked, "calm")))
    begin = time.monotonic()
    again = asyncio.run(ask_all(url, salted(asked, "calm again")))
    seconds = time.monotonic() - begin
    for kind, one, other in zip(asked, answers, again, strict=True):
        if (found := one.error or other.difference(one)) is not None:
            raise SystemExit(f"{kind.name} is not the same twice, with nothing killed: {found}")
    streams = [answer for kind, answer in zip(asked, again, strict=True) if kind.body.get("stream")]
    begun = max(answer.times[0] for answer in streams) - begin
    tokens = [answer.usage["prompt_tokens"] for answer in answers if answer.usage]
    print(
        f"prompts of {min(tokens)} to {max(tokens)} tokens; {begun:.1f} s until all have begun, {seconds:.1f} s in all"
    )
    return Calm(asked, answers, begun, seconds)


def run_kills(server: Server, calm: Calm, kills: int, how: int, seed: int, *, decoding: bool) -> dict[str, Row]:
    """Kills one replica after the other, each under all kinds of requests at once; with `decoding` once all streams
    have begun."""
    asked, wanted = calm.asked, calm.answers
    earliest = min(calm.begun, 0.8 * calm.seconds) if decoding else 0.02
    rng = random.Random(seed)
    rows = {kind.name: Row() for kind in asked}
    with httpx.Client(base_url=server.url, timeout=ANSWER_TIMEOUT_S) as http:
        for number in range(1, kills + 1):
            cut_before = sum(_series(http, "manta:request_continuations_total"))
            victim = rng.choice(server.replicas())
            delay = rng.uniform(earliest, 0.9 * calm.seconds)
            answers, moment = asyncio.run(ask_and_kill(server, salted(asked, str(number)), delay, victim, how))
            gaps = []
            for kind, answer, expected in zip(asked, answers, wanted, strict=True):
                row = rows[kind.name]
                row.answers += 1
                if answer.error is not None:
                    row.errors += 1
                    print(f"kill {number}: {kind.name}: {answer.error}", flush=True)
                elif (found := answer.difference(expected)) is not None:
                    row.mismatches += 1
                    print(f"kill {number}: {kind.name}: {found}", flush=True)
                if (gap := answer.gap(moment)) is not None:
                    gaps.append((gap, kind.name))
            cut = int(sum(_series(http, "manta:request_continuations_total")) - cut_before)
            # Those that were cut are those with the longest gaps.
            for gap, name in sorted(gaps, reverse=True)[:cut]:
                rows[name].gaps.append(gap)
            print(f"kill {number} of {kills}: {cut} of {len(asked)} requests were cut", flush=True)
            deadline = time.monotonic() + ANSWER_TIMEOUT_S
            while not server.complete():
                if time.monotonic() > deadline:
                    raise SystemExit(f"the replica that was killed is not replaced after {ANSWER_TIMEOUT_S:.0f} s")
                time.sleep(_POLL_S)
            time.sleep(_LISTED_S)
    return rows


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below or at which this share of them lies; None of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def table(rows: dict[str, Row]) -> str:
    lines = [f"{'kind':18}{'answers':>9}{'cut':>6}{'errors':>8}{'mismatches':>12}{'gap p50':>10}{'gap p99':>10}"]
    total = Row()
    for row in rows.values():
        total.answers += row.answers
        total.errors += row.errors
        total.mismatches += row.mismatches
        total.gaps += row.gaps
    for name, row in [*rows.items(), ("all", total)]:
        gaps = (percentile(row.gaps, share) for share in (0.5, 0.99))
        shown = "".join(f"{'-' if gap is None else f'{gap:.2f} s':>10}" for gap in gaps)
        lines.append(f"{name:18}{row.answers:9}{len(row.gaps):6}{row.errors:8}{row.mismatches:12}{shown}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--signal", choices=("KILL", "STOP"), default="KILL")
    parser.add_argument("--model", default="manta-tiny", help=f"{', '.join(models.SHAPES)}, or what manta serve takes")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--words", type=int, default=0, help="more in every prompt, each of its own")
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--decoding", action="store_true", help="kill once every stream has begun")
    parser.add_argument("--no-kv-host", action="store_true", help="without memory that outlives a replica")
    parser.add_argument("--seed", type=int, default=0, help="of who is killed, and when")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    path = str(models.find(arguments.model)) if arguments.model in models.SHAPES else arguments.model
    facts = machine.describe(os.cpu_count() or 1)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        options = ["--kv-host-memory", "0"] if arguments.no_kv_host else []
        command = [path, "--served-model-name", "model", *options]
        server = Server(command, arguments.replicas, Path(directory) / "serve.log")
        try:
            calm = undisturbed(server.url, "model", arguments.prompt, arguments.words, arguments.max_tokens)
            how = getattr(signal, f"SIG{arguments.signal}")
            rows = run_kills(server, calm, arguments.kills, how, arguments.seed, decoding=arguments.decoding)
        finally:
            server.close()
    print(table(rows))
    if arguments.json:
        found = {"facts": facts, "kills": arguments.kills, "rows": {name: asdict(row) for name, row in rows.items()}}
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if any(row.errors or row.mismatches for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
