"""One worker: a process of its own in an environment of its own, spoken to in JSON lines."""

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from benchmarks.peers.engines import environment
from benchmarks.peers.measures import Timeline
from benchmarks.workloads import Item

_WARM_UP = Item(tuple(range(3, 35)), 4)
_LOG_TAIL = 1500
_LEAVE_SECONDS = 10.0
"""What a worker gets to end by itself, and what is left of it after that to be gone."""


class WorkerError(Exception):
    """A worker failed, died or took too long; says which one, and how its log ends."""


class Worker:
    """A started engine. Raises WorkerError from every method; is of no more use after that."""

    def __init__(self, name: str, python: Path, load: dict[str, Any], *, log: Path, timeout: float) -> None:
        """Returns when the engine has loaded and answered a first short request."""
        self.name, self._log, self._timeout = name, log, timeout
        self._received, self._is_failed, self._is_frozen = b"", False, False
        began = time.perf_counter()
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", f"workers.{name}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(name),
                # Not where this project can be imported from by chance.
                cwd=log.parent,
                start_new_session=True,
            )
        try:
            loaded = self._ask({"verb": "load", **load})
            self.run([_WARM_UP])
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - began
        self.version: str = loaded["version"]
        self.weight_bytes: int = loaded["weight_bytes"]

    def run(self, items: Sequence[Item]) -> Timeline:
        """Has every item's tokens drawn, all submitted at once."""
        pairs = [(item.prompt, item.output_tokens) for item in items]
        return Timeline.of(self._ask({"verb": "run", "items": pairs}))

    def close(self) -> None:
        """Ends the worker and whatever it started."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._freeze(False)
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(timeout=0.0 if self._is_failed else _LEAVE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._wait_for_group()

    def _wait_for_group(self) -> None:
        """Until the last process is gone: what it holds of memory is the next engine's."""
        deadline = time.monotonic() + _LEAVE_SECONDS
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self._process.pid, 0)
                time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _freeze(self, is_frozen: bool) -> None:
        """Between orders: some engines poll while they wait, and would take that time from the one that runs."""
        if is_frozen != self._is_frozen:
            self._is_frozen = is_frozen
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGSTOP if is_frozen else signal.SIGCONT)

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._freeze(False)
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("ended") from None
        answer: dict[str, Any] = json.loads(self._line())
        if "error" in answer:
            raise self._failed(answer["error"])
        self._freeze(True)
        return answer

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._received:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise self._failed(f"no answer in {self._timeout:.0f} s")
                piece = os.read(self._process.stdout.fileno(), 2**20)
                if not piece:
                    raise self._failed("ended")
                self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _failed(self, reason: str) -> WorkerError:
        self._is_failed = True
        return WorkerError(f"{self.name}: {reason}\n{self._log.read_text(errors='replace')[-_LOG_TAIL:]}".rstrip())
