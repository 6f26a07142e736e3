"""`manta serve` as those see it who kill its processes: who is there to be killed, and whether all are there again."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from benchmarks import processes
from benchmarks.processes import ProcessTime
from benchmarks.start import is_ready, reachable, wait
from cluster.ports import free_ports

ANSWER_TIMEOUT_S = 180.0
VICTIMS = {"replica": b":LLMReplica", "kv-host": b":KVHostActor", "gateway": b":Gateway", "rank": b":ShardActor"}
"""Who can be killed: name -> what the command line of its process has."""
_LOADED = re.compile(r"^\S+ INFO replica (\w+): .* pages of \d+ tokens", re.MULTILINE)
"""What a replica logs once it has loaded the model."""
_LINKED = re.compile(r"^\S+ INFO (?:replica|rank of) \w+: KV host at ", re.MULTILINE)
"""What a replica, or each of its ranks, logs once it has found the KV host."""

_CONTINUED = re.compile(r": Request (\S+?)(?:-\d{1,3})? goes on elsewhere", re.MULTILINE)
"""What a gateway logs of a request that its replica does not go on with; a number at its end is that of the prompt."""


class Server:
    """`manta serve` and the processes that belong to it."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        replicas: int,
        gateways: int,
        kv_host: bool,
        tensor: int = 1,
        pipeline: int = 1,
    ) -> None:
        """Returns once it serves with all of them. `arguments`: beyond those of the numbers."""
        (port,) = free_ports(1)
        command = [sys.executable, "-m", "deployments.cli.main", "serve", *arguments, "--port", str(port)]
        command += ["--replicas", str(replicas), "--gateways", str(gateways), "--deterministic"]
        command += [] if kv_host else ["--kv-host-memory", "0"]
        command += ["--tensor-parallel", str(tensor), "--pipeline-parallel", str(pipeline)]
        self._ranks = tensor * pipeline
        self._counts = {"replica": replicas, "kv-host": int(kv_host), "gateway": gateways}
        self._counts["rank"] = replicas * self._ranks if self._ranks > 1 else 0
        self._killed: dict[str, set[tuple[int, int]]] = {name: set() for name in VICTIMS}
        self._num_linked = 0
        """How often a replica had found a KV host when one was killed last."""
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        self.url = f"http://127.0.0.1:{port}"
        self._http = httpx.Client(base_url=self.url, timeout=ANSWER_TIMEOUT_S)
        try:
            wait(lambda: reachable(port) and is_ready(self._http) and self.complete(), self._process, log)
        except BaseException:
            self.close()
            raise

    def processes(self, victim: str) -> list[ProcessTime]:
        """All of that name."""
        found = []
        for entry in processes.tree(self._process.pid):
            try:
                command = Path(f"/proc/{entry.pid}/cmdline").read_bytes()
            except OSError:
                continue
            if VICTIMS[victim] in command:
                found.append(entry)
        return found

    def kill(self, victim: str, process: ProcessTime, how: int) -> None:
        """Sends a signal that ends a process, or that has it replaced."""
        if victim == "kv-host":
            self._num_linked = len(_LINKED.findall(self._logged()))
        os.kill(process.pid, how)
        self._killed[victim].add(process.identity)

    def complete(self) -> bool:
        """Whether nothing is missing, and all serve."""
        return self.missing() is None and is_ready(self._http)

    def missing(self) -> str | None:
        """What keeps it from having as many of each as there should be, none of them killed.

        By the log: metrics keep those of a dead one for a while, and a process is there before it serves.
        """
        for name, count in self._counts.items():
            there = {process.identity for process in self.processes(name)}
            if len(there) != count or self._killed[name] & there:
                return f"{count} {name} should be there, {len(there - self._killed[name])} are"
        logged = self._logged()
        # With a rank, its replica goes too.
        num_loaded = len(set(_LOADED.findall(logged))) - len(self._killed["replica"]) - len(self._killed["rank"])
        num_linked = len(_LINKED.findall(logged)) - self._num_linked
        if num_loaded != self._counts["replica"]:
            return f"{self._counts['replica']} replicas should have loaded, {num_loaded} have"
        if num_linked < self._counts["kv-host"] * num_loaded * self._ranks:
            return "a replica has not found the KV host"
        return None

    def last_words(self, lines: int = 20) -> str:
        """The end of its log."""
        return "\n".join(self._logged().splitlines()[-lines:])

    def _logged(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def continued(self) -> set[str]:
        """Ids of all answers so far that went on at another replica."""
        return set(_CONTINUED.findall(self._logged()))

    def series(self, name: str) -> list[float]:
        """The values of all series of a metric."""
        lines = self._http.get("/metrics").raise_for_status().text.splitlines()
        return [float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}(\{{|\s)", line)]

    def close(self) -> None:
        """Ends it, with all that is below it."""
        self._http.close()
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
