"""Processes are killed under every kind of request; each answer must be what it is when nothing happens.

python -m benchmarks.chaos --kills 200 --replicas 2
python -m benchmarks.chaos --kills 20 --signal STOP
python -m benchmarks.chaos --kills 30 --victims replica,kv-host,gateway --gateways 2
python -m benchmarks.chaos --kills 20 --victims rank --tensor-parallel 2
python -m benchmarks.chaos --kills 20 --model s135m --words 870 --max-tokens 200 --decoding [--no-kv-host]

The server runs with `--deterministic`, so that not even rounding may tell an answer that was cut from one that was not.
Every kill has caches of its own (a salt), so that what one round has computed helps no other. A gap is how much longer
than usual a stream was silent at the kill that cut it, before its first event or between two; of a KV host, which cuts
none, those of all streams. The next kill waits until all processes are there again and replicas have loaded the model,
so that a gap tells how soon a death is noticed, and not how long it takes to start a replica.

A killed gateway takes its connections along. With gateways among the victims the clients say that they may come back,
and do: to their streams where they were, and with the same request when nothing has come of it, as of any answer in one
piece. Those are counted as resumed and as repeated; everything else is an error.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks import machine, models
from benchmarks.chaos_client import ask_all
from benchmarks.chaos_server import ANSWER_TIMEOUT_S, VICTIMS, Server
from benchmarks.chaos_streams import PROMPT, Answer, Kind, kinds, lengthened, salted
from benchmarks.chaos_tally import Tally

_POLL_S = 0.1
_WATCH_S = 0.01
_LISTED_S = 1.5
"""From the moment that a replica has loaded the model until every gateway has been told of it."""
_STARTED_S = 5.0
"""From the moment that a gateway's process is there until requests are sent to it."""


@dataclass(frozen=True, slots=True)
class Blow:
    """When something strikes."""

    delay: float
    """In seconds."""
    begun: bool
    """Whether from the moment that every stream has begun, instead of from the first request."""


async def strike_under(streams: Sequence[Answer], blow: Blow, strike: Callable[[], None]) -> float:
    """The moment at which something struck the streams that are being answered."""
    while blow.begun and not all(answer.times or answer.error for answer in streams):
        await asyncio.sleep(_WATCH_S)
    await asyncio.sleep(blow.delay)
    strike()
    return time.monotonic()


async def ask_under(
    url: str, asked: Sequence[Kind], blow: Blow, strike: Callable[[], None], *, comes_back: bool
) -> tuple[list[Answer], float]:
    """The answers to all of them, and the moment at which something struck."""
    answers = [Answer() for _ in asked]
    streams = [answer for kind, answer in zip(asked, answers, strict=True) if kind.body.get("stream")]
    _, moment = await asyncio.gather(
        ask_all(url, asked, comes_back=comes_back, into=answers), strike_under(streams, blow, strike)
    )
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


@dataclass(frozen=True, slots=True)
class Plan:
    """Who is killed, how often and when."""

    victims: tuple[str, ...]
    """They take turns."""
    kills: int
    how: int
    """The signal's number."""
    seed: int
    decoding: bool
    """Once all streams have begun."""


def run_kills(server: Server, calm: Calm, plan: Plan) -> Tally:
    """Kills one process after the other, each under all kinds of requests at once."""
    earliest, latest = (0.0, 0.9 * (calm.seconds - calm.begun)) if plan.decoding else (0.02, 0.9 * calm.seconds)
    rng = random.Random(plan.seed)
    tally = Tally([kind.name for kind in calm.asked], plan.victims)
    comes_back = "gateway" in plan.victims
    for number in range(1, plan.kills + 1):
        victim = plan.victims[(number - 1) % len(plan.victims)]
        blow = Blow(rng.uniform(earliest, latest), plan.decoding)
        process = rng.choice(server.processes(victim))
        asked = salted(calm.asked, str(number))
        strike = partial(server.kill, victim, process, plan.how)
        answers, moment = asyncio.run(ask_under(server.url, asked, blow, strike, comes_back=comes_back))
        _await_all(server, victim)
        cut = tally.victims[victim].cut
        for complaint in tally.add(victim, answers, calm.answers, moment, server.continued()):
            print(f"kill {number}: {complaint}", flush=True)
        cut = tally.victims[victim].cut - cut
        seconds = time.monotonic() - moment
        print(
            f"kill {number} of {plan.kills}, {victim}: {cut} of {len(asked)} were cut, complete after {seconds:.1f} s",
            flush=True,
        )
    return tally


def _await_all(server: Server, victim: str) -> None:
    """Until whoever was killed has been replaced, and all know."""
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while not server.complete():
        if time.monotonic() > deadline:
            missing = server.missing() or "it does not say that it is ready"
            raise SystemExit(
                f"the {victim} that was killed is not replaced after {ANSWER_TIMEOUT_S:.0f} s: {missing}\n"
                f"{server.last_words()}"
            )
        time.sleep(_POLL_S)
    time.sleep(_STARTED_S if victim == "gateway" else _LISTED_S)


def victims(text: str) -> tuple[str, ...]:
    """Names with commas between them. Raises ArgumentTypeError."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in VICTIMS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(VICTIMS)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks of each replica, that share each layer")
    parser.add_argument("--pipeline-parallel", type=int, default=1, help="stages of each replica")
    parser.add_argument("--victims", type=victims, default=("replica",), help=f"of {','.join(VICTIMS)}, in turns")
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
    if arguments.no_kv_host and "kv-host" in arguments.victims:
        parser.error("--no-kv-host leaves no KV host to kill")
    if "rank" in arguments.victims and arguments.tensor_parallel * arguments.pipeline_parallel < 2:
        parser.error("--victims rank takes replicas of several: --tensor-parallel 2")
    path = str(models.find(arguments.model)) if arguments.model in models.SHAPES else arguments.model
    facts = machine.describe(os.cpu_count() or 1)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        server = Server(
            [path, "--served-model-name", "model"],
            Path(directory) / "serve.log",
            replicas=arguments.replicas,
            gateways=arguments.gateways,
            kv_host=not arguments.no_kv_host,
            tensor=arguments.tensor_parallel,
            pipeline=arguments.pipeline_parallel,
        )
        try:
            calm = undisturbed(server.url, "model", arguments.prompt, arguments.words, arguments.max_tokens)
            how = getattr(signal, f"SIG{arguments.signal}")
            plan = Plan(arguments.victims, arguments.kills, how, arguments.seed, arguments.decoding)
            tally = run_kills(server, calm, plan)
        finally:
            server.close()
    print(tally.table())
    if arguments.json:
        rows = {"kinds": tally.kinds, "victims": tally.victims}
        found = {"facts": facts, "kills": tally.kills}
        found |= {group: {name: asdict(row) for name, row in each.items()} for group, each in rows.items()}
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    if tally.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
