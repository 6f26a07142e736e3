"""`manta serve`: one machine, one command. Checks, starts a private Ray, deploys, waits, serves, and cleans up.

Owns the order of these phases and what the user is told in each; every phase's work is another file's. Whatever ends
it, an error, Ctrl-C or SIGTERM, no process and no directory is left behind. Ctrl-C and SIGTERM let the requests that
run finish first, for a while.
"""

import asyncio
import os
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from cluster.shards.cuttable import cuttable_spec
from cluster.shards.placement import NoRoom
from deployments.cli.errors import CommandError, ExitCode
from deployments.config import AppConfig
from deployments.model_check import check_model
from deployments.private_ray import PrivateRay
from engine.machine import available_cores
from engine.models.source import BUILT_IN

APPLICATION = "default"
POLL_S = 0.2
STATUS_EVERY = 5
"""Polls of the endpoint for each look at Serve's status, which costs a call to the controller."""
DRAIN_MARGIN_S = 5.0
"""How much longer the gateways may take to answer that they have drained."""
_BAD_INPUT = ("engine.errors.ModelError", "cluster.shards.placement.NoRoom")
_TRACEBACK = "Traceback (most recent call last):"
_FRAME = re.compile(r'  File "')
_EXCEPTION = re.compile(r"[\w.]*[A-Z]\w*: ")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What concerns the machine rather than the application."""

    host: str = "127.0.0.1"
    port: int = 8000
    dashboard: bool = False
    drain_timeout_s: float = 10.0
    """How long requests may go on once serving is interrupted."""


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM. Like KeyboardInterrupt, no `except Exception` may take it for an error."""


def launch(config: AppConfig, options: LaunchOptions, say: Say) -> None:
    """Serves `config` until interrupted; returns after a clean stop.

    `say` shows a line to the user. Raises ModelError or CommandError when serving is impossible, and CommandError with
    exit code 130 when interrupted before it began.
    """
    config = _absolute(config)
    cuttable_spec(check_model(config.engine), config.engine, config.parallel)
    check_port(options.host, options.port)
    ray = PrivateRay(num_cpus=available_cores(), dashboard=options.dashboard)
    watch = _Signals(ray.abandon)
    try:
        watch.install()
        _serve(ray, config, options, say, watch)
    except _Interrupted:
        watch.stopping = True
        say("Stopping ... (Ctrl-C again to stop at once)")
        if watch.serving:
            _drain(options.drain_timeout_s, say)
        else:
            raise CommandError("interrupted before the model was ready", ExitCode.INTERRUPTED) from None
    finally:
        watch.stopping = True
        ray.stop()


def _drain(timeout_s: float, say: Say) -> None:
    """Lets the requests that run finish, and has those that take longer end with an error; bounded in time."""
    try:
        cut = asyncio.run(_drain_gateways(timeout_s))
    except Exception as error:
        # Whatever it is, what is left ends when the processes do.
        say(f"Could not wait for the requests that run: {error}")
        return
    if cut:
        say(f"{cut} requests were not finished after {timeout_s:g} s, and ended with an error.")


async def _drain_gateways(timeout_s: float) -> int:
    """How many requests were ended."""
    from ray import serve

    # On this loop: with the throughput settings a handle has none of its own.
    drained = serve.get_app_handle(APPLICATION).broadcast("drain", timeout_s)
    return sum(await drained.results_async(timeout_s=timeout_s + DRAIN_MARGIN_S))


def check_port(host: str, port: int) -> None:
    """Raises CommandError if `port` cannot be listened on."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise CommandError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another one with --port",
            ExitCode.BAD_INPUT,
        ) from None


def _serve(ray: PrivateRay, config: AppConfig, options: LaunchOptions, say: Say, watch: "_Signals") -> None:
    began = time.monotonic()
    say(f"Starting {config.model_name} on {config.replicas} replica{'s' if config.replicas > 1 else ''} ...")
    lost = ray.start(options.host, options.port)
    if lost:
        say(lost)
    watch.install()  # Ray has put its own handlers in place.
    _deploy(config)
    with _Console(ray.log_file, say) as console:
        url = f"http://{_reachable(options.host)}:{options.port}"
        _wait_until_ready(url, console)
        watch.serving = True
        say(_welcome(config, url, time.monotonic() - began))
        if options.dashboard:
            say("Ray's dashboard: http://127.0.0.1:8265")
        while True:
            time.sleep(0.5)
            console.show_new()


def _deploy(config: AppConfig) -> None:
    from ray.serve.api import _run

    from deployments.app import build

    try:
        # This Ray has the one node for good.
        application = build(config.model_copy(update={"nodes_may_join": False}))
    except NoRoom as error:
        raise CommandError(str(error), ExitCode.BAD_INPUT) from None
    _run(application, name=APPLICATION, route_prefix="/", _blocking=False)


def _wait_until_ready(url: str, console: "_Console") -> None:
    """Returns once a request would be served. Raises CommandError with the reason once it is clear that none will."""
    polls = 0
    while not _answers(f"{url}/ready"):
        polls += 1
        console.show_new()
        if polls % STATUS_EVERY == 0:
            _check_status()
        time.sleep(POLL_S)
    console.show_new()


def _check_status() -> None:
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    if application is not None and application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        messages = [application.message, *(each.message for each in application.deployments.values())]
        raise failure_of("\n".join(messages))


def failure_of(message: str) -> CommandError:
    """The one line of a failed deployment's message that says why, and the exit code that goes with it.

    Serve's message holds the traceback of the constructor that raised, inside that of Serve's own error: the reason is
    the exception that the last frame is followed by.
    """
    for line in reversed(message.splitlines()):
        name, _, reason = line.strip().partition(": ")
        if name in _BAD_INPUT:
            return CommandError(reason, ExitCode.BAD_INPUT)
    name, _, reason = _exception_line(message).partition(": ")
    kind = name.rpartition(".")[2] if reason else name
    return CommandError(f"the model could not be served: {kind}{': ' if reason else ''}{reason}")


def _exception_line(message: str) -> str:
    lines = [line.rstrip() for line in message.splitlines() if line.strip()]
    after_frames, named = [], []
    in_frames = False
    for line in lines:
        if _FRAME.match(line):
            in_frames = True
        elif not line.startswith(" "):
            if not line.endswith(_TRACEBACK):
                after_frames += [line] if in_frames else []
                named += [line] if _EXCEPTION.match(line) else []
            in_frames = False
    return (after_frames or named or lines or ["no reason given"])[-1].strip()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def _absolute(config: AppConfig) -> AppConfig:
    """The configuration with local paths made absolute: replicas and hosts run in other working directories."""
    if config.kv_host.disk is not None:
        disk = config.kv_host.disk.expanduser().absolute()
        config = config.model_copy(update={"kv_host": config.kv_host.model_copy(update={"disk": disk})})
    model = Path(config.engine.model).expanduser()
    if config.engine.model == BUILT_IN or not model.exists():
        return config
    name = config.served_model_name or model.resolve().name
    engine = config.engine.model_copy(update={"model": str(model.resolve())})
    return config.model_copy(update={"engine": engine, "served_model_name": name})


def _welcome(config: AppConfig, url: str, seconds: float) -> str:
    body = f'{{"model": "{config.model_name}", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return (
        f"\nServing {config.model_name} at {url} (ready after {seconds:.1f} s). Ctrl-C stops it. Try:\n\n"
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '{body}'\n"
    )


class _Signals:
    """Turns the first Ctrl-C or SIGTERM into `_Interrupted`; a second one, or a hang-up, ends everything at once."""

    def __init__(self, end_at_once: Callable[[], None]) -> None:
        self.serving = False
        self.stopping = False
        self._end_at_once = end_at_once

    def install(self) -> None:
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        # The terminal was closed. nohup has it ignored: then serving goes on.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A hang-up reaches Ray's own processes too, and does not spare them as Ctrl-C does: there is nobody left to ask
        # for an orderly end, and Ray would soon end this process from below.
        if not self.stopping and number != signal.SIGHUP:
            self.stopping = True
            raise _Interrupted
        self._end_at_once()
        os._exit(ExitCode.INTERRUPTED)


class _Console:
    """Shows what the processes of the application log."""

    def __init__(self, path: Path, say: Say) -> None:
        self._path = path
        self._say = say
        self._file: TextIO | None = None

    def show_new(self) -> None:
        """Shows the lines that were written since the last call."""
        if self._file is None:
            if not self._path.exists():
                return
            self._file = self._path.open(encoding="utf-8", errors="replace")
        for line in self._file:
            self._say(line.rstrip("\n"))

    def __enter__(self) -> "_Console":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._file is not None:
            self.show_new()
            self._file.close()
