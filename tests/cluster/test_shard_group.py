"""Groups of ranks on a real Ray: they compute together, are lost together within 2 s, and leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.build import build_engine
from tests.cluster.shards.fake_ranks import MAX_POSITION, NUM_PAGES
from tests.cluster.shards.group_server import generate, real_config
from tests.engine.rig import expected

ROOT = Path(__file__).parents[2]
PROMPTS = [[5, 6, 7], [8] * 20, [1, 2], [3] * 11, [9, 9]]
NOTHING = {"actors": [], "places": [], "cpus": 6.0}
SOON_S = 2.0


class Failed(Exception):
    """What the server answers when something was raised there."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(f"{answer['error']}: {answer['message']}")
        self.seconds: float = answer["seconds"]


class Ranks:
    """A group that was started."""

    def __init__(self, started: dict[str, Any]) -> None:
        self.pids: list[int] = [pid for pid, _, _ in started["ranks"]]
        self.nodes: list[str] = [node for _, node, _ in started["ranks"]]
        self.addresses: list[str] = [address for _, _, address in started["ranks"]]
        self.doors: list[str] = started["doors"]
        self.folder = Path(started["folder"])
        self.started = started

    def are_gone(self) -> bool:
        return not any(is_alive(pid) for pid in self.pids) and not self.folder.exists()


class Server:
    """See `tests.cluster.shards.group_server`; a node with 4 CPUs, and one with 2."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise Failed(answer)
        return answer["result"]

    def start(self, **order: Any) -> Ranks:
        return Ranks(self.ask("start", **order))

    def leaves_nothing(self) -> None:
        until(lambda: self.ask("left") == NOTHING)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # What Ray leaves to others to end may still write.
    with tempfile.TemporaryDirectory(prefix="mg-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        command = [sys.executable, "-m", "tests.cluster.shards.group_server", directory, "4", "2"]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdin is not None
            assert process.stdout.readline() == "ready\n"
            yield Server(process)
            process.stdin.close()
            process.wait(60)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition: Any, seconds: float = 15.0) -> float:
    """Seconds until it is so."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it did not come true in time"
        time.sleep(0.02)
    return time.monotonic() - began


def ends(server: Server, ranks: Ranks) -> None:
    """Once it is closed, nothing of a group is left."""
    server.ask("close")
    until(ranks.are_gone)
    server.leaves_nothing()


def ends_by_itself(server: Server, ranks: Ranks) -> None:
    """The processes and files of a group that is lost go before anybody has closed it."""
    until(ranks.are_gone)
    ends(server, ranks)


@pytest.mark.parametrize(("tensor", "pipeline", "depth"), [(2, 1, 1), (1, 3, 3), (2, 2, 2)])
def test_a_group_computes_what_one_rank_would(server: Server, tensor: int, pipeline: int, depth: int) -> None:
    ranks = server.start(tensor=tensor, pipeline=pipeline)
    assert ranks.started["pages"] == NUM_PAGES - tensor * pipeline + 1, "as many as the rank with least room has"
    assert ranks.started["max_model_len"] == MAX_POSITION
    got = server.ask("generate", prompts=PROMPTS, max_tokens=30)
    assert got["tokens"] == [expected(prompt, 30) for prompt in PROMPTS]
    assert got["deepest"] == depth
    ends(server, ranks)


def test_what_is_too_large_to_send_fails_its_request_and_nobody_elses(server: Server) -> None:
    ranks = server.start(tensor=2)
    prompts = [[5], [6], [7]]
    before = server.ask("bound", max_bytes=900)
    try:
        got = server.ask("generate", prompts=prompts, max_tokens=30, biased=True)
    finally:
        server.ask("bound", max_bytes=before)
    assert list(got["failed"]) == ["0"] and "cannot be sent: a Batch of" in got["failed"]["0"]
    assert got["tokens"][1:] == [expected(prompt, 30) for prompt in prompts[1:]]
    assert server.ask("generate", prompts=prompts, max_tokens=30, biased=True)["failed"] == {}
    ends(server, ranks)


def test_ranks_say_for_how_long_they_had_nothing_to_run(server: Server) -> None:
    ranks = server.start(pipeline=2)

    def waited_after(pause_s: float) -> float:
        """What the rank that waited least did, once all have told how they ran a prompt after this pause."""
        _, before = server.ask("waited")
        server.ask("generate", prompts=[[5, 6, 7]], max_tokens=1, pause_s=pause_s)
        until(lambda: min(map(int.__sub__, server.ask("waited")[1], before)) >= 1)
        return float(min(server.ask("waited")[0]))

    first = waited_after(0.0)
    assert 1.0 <= waited_after(1.0) - first < 5.0
    ends(server, ranks)


def test_stages_are_on_nodes_of_their_own_and_the_ranks_of_one_share_theirs(server: Server) -> None:
    ranks = server.start(name="app:r1", tensor=2, pipeline=2)
    first, _, second, _ = ranks.nodes
    assert ranks.nodes == [first, first, second, second] and first != second
    # Those of this node come through its files, the others over the network.
    assert sorted(ranks.doors) == ["tcp", "tcp", "unix", "unix"]
    assert server.ask("left")["actors"] == [f"manta:app:r1:rank {rank}" for rank in range(4)]
    assert "127.0.0.1" not in ranks.addresses
    ends(server, ranks)


def test_labels_place_ranks_where_they_are_wanted(server: Server) -> None:
    ranks = server.start(pipeline=2)
    first, second = ranks.nodes
    ends(server, ranks)
    swapped = server.start(pipeline=2, labels=[{"ray.io/node-id": second}, {"ray.io/node-id": first}])
    assert swapped.nodes == [second, first]
    ends(server, swapped)
    together = server.start(pipeline=2, labels=[{"ray.io/node-id": second}])
    assert together.nodes == [second, second]
    ends(server, together)


class TestRefusals:
    def test_more_ranks_than_there_is_room_for(self, server: Server) -> None:
        with pytest.raises(Failed) as refused:
            server.start(tensor=4, pipeline=2)
        assert "NoRoom: there is no room: TP4 x PP2 is 8 ranks of 1 CPU each" in str(refused.value)
        assert "has 4 CPU" in str(refused.value) and "has 2 CPU" in str(refused.value)
        assert "nearest layouts that fit: TP4 x PP1, TP2 x PP2" in str(refused.value)
        assert refused.value.seconds < 1
        server.leaves_nothing()

    def test_what_is_free_counts_and_not_what_there_is(self, server: Server) -> None:
        ranks = server.start(tensor=4)
        with pytest.raises(Failed, match=r"NoRoom.* has 0 CPU"):
            server.start(tensor=4)
        ends(server, ranks)

    @pytest.mark.parametrize(
        ("trouble", "reason"),
        [
            ({"load": 1}, r"ModelError: weights.safetensors: layer 3 is missing"),
            ({"dies_loading": 1}, r"ShardLost: rank 1 on .* is lost: its process has ended"),
            ({"start": 2}, r"ShardLost: rank 2 on .* is lost: MemoryError: no memory for the pages"),
        ],
    )
    def test_a_rank_that_cannot_start_says_why(self, server: Server, trouble: dict[str, int], reason: str) -> None:
        with pytest.raises(Failed, match=reason):
            server.start(tensor=3, model=json.dumps(trouble))
        server.leaves_nothing()

    @pytest.mark.parametrize(
        ("prepare", "reason"),
        [
            (
                "prepare_in_vain",
                r"it could not start on \d+\.\d+\.\d+\.\d+: ModuleNotFoundError: No module named 'cluster'$",
            ),
            ("never_be_prepared", r"it has not started in 5 s"),
        ],
    )
    def test_a_process_that_does_not_get_so_far_as_to_load_says_why(
        self, server: Server, prepare: str, reason: str
    ) -> None:
        with pytest.raises(Failed, match=r"ShardLost: rank 0 on a node of Ray's choice is lost: " + reason):
            server.start(tensor=1, pipeline=1, prepare=prepare, starting_s=5.0)
        server.leaves_nothing()

    @pytest.mark.parametrize("phase", ["loading", "starting"])
    @pytest.mark.parametrize("rank", [0, 2])
    def test_a_rank_that_hangs_before_it_serves_is_named_and_nobody_waits_for_it(
        self, server: Server, phase: str, rank: int
    ) -> None:
        """Its neighbours, which wait for it, are ended with it."""
        began = time.monotonic()
        with pytest.raises(Failed, match=rf"ShardLost: rank {rank} on .* is lost: silent for 3\.\d s, after 0 batches"):
            server.start(tensor=3, model=json.dumps({f"stops_{phase}": rank}), loading_silence_s=3.0)
        assert time.monotonic() - began < 15
        server.leaves_nothing()


class TestLosses:
    def test_an_exception_in_a_step_is_the_reason_and_not_what_it_did_to_others(self, server: Server) -> None:
        ranks = server.start(tensor=3, model=json.dumps({"step": [2, 5]}))
        with pytest.raises(Failed) as failed:
            server.ask("generate", prompts=PROMPTS, max_tokens=30)
        assert f"ShardLost: rank 2 on {ranks.addresses[2]}" in str(failed.value)
        assert "is lost: MemoryError: no memory for the activations" in str(failed.value)
        assert failed.value.seconds < SOON_S
        ends_by_itself(server, ranks)

    def test_a_rank_that_dies_in_a_step_is_blamed_and_not_its_neighbours(self, server: Server) -> None:
        ranks = server.start(tensor=3, model=json.dumps({"dies_at": [1, 5]}))
        reason = rf"rank 1 on .*process {ranks.pids[1]} is lost: its process has ended"
        with pytest.raises(Failed, match=reason) as failed:
            server.ask("generate", prompts=PROMPTS, max_tokens=30)
        assert failed.value.seconds < SOON_S
        ends_by_itself(server, ranks)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
    @pytest.mark.parametrize("place", [0, 3])
    def test_a_rank_that_is_killed_or_stopped_is_lost_within_two_seconds(
        self, server: Server, number: signal.Signals, place: int
    ) -> None:
        """The second node of the two: its ranks are reached over the network."""
        ranks = server.start(tensor=2, pipeline=2)
        hit_at: list[float] = []

        def hit() -> None:
            hit_at.append(time.monotonic())
            os.kill(ranks.pids[place], number)

        threading.Timer(0.7, hit).start()
        with pytest.raises(Failed, match=rf"ShardLost: rank {place} on .*process {ranks.pids[place]} is lost"):
            server.ask("generate", prompts=PROMPTS * 3, max_tokens=MAX_POSITION - 20, pause_s=0.5)
        assert time.monotonic() - hit_at[0] < SOON_S
        ends_by_itself(server, ranks)

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
    def test_a_rank_that_is_lost_while_nothing_runs_is_noticed_too(
        self, server: Server, number: signal.Signals
    ) -> None:
        ranks = server.start(tensor=2)
        assert server.ask("failure") is None
        os.kill(ranks.pids[1], number)
        assert until(lambda: server.ask("failure") is not None) < SOON_S
        until(lambda: not any(map(is_alive, ranks.pids)))
        with pytest.raises(Failed, match="rank 1 on"):
            server.ask("generate", prompts=PROMPTS, max_tokens=3)
        ends_by_itself(server, ranks)


def test_pages_overflow_to_the_hosts_of_all_ranks_and_come_back(server: Server) -> None:
    ranks = server.start(tensor=2, pipeline=2, kv_hosts=True)
    until(lambda: server.ask("ready"))
    prompts = [[index] * 90 for index in range(6)]  # each takes more than a third of the pages
    for _ in range(3):
        for prompt in prompts:
            got = server.ask("generate", prompts=[prompt], max_tokens=4)
            assert got["tokens"] == [expected(prompt, 4)]
    stats = server.ask("stats")
    assert stats["tier_pages_saved_total"] >= 6 * (90 // 4)
    assert stats["tier_pages_loaded_total"] > 0
    assert stats["tier_pages_corrupt_total"] == stats["tier_failures_total"] == 0
    ends(server, ranks)


@pytest.mark.parametrize("degrees", [{"tensor": 2, "pipeline": 2}, {"pipeline": 3}])
def test_the_real_ranks_draw_what_one_engine_would(server: Server, degrees: dict[str, int]) -> None:
    prompts = [list(range(3, 3 + 7 * length)) for length in range(1, 6)]
    alone = build_engine(real_config("manta-tiny"))
    want = generate(alone, prompts, 12)
    alone.close()
    assert server.ask("build", model="manta-tiny", prompts=prompts, max_tokens=12, **degrees) == want


def test_ranks_whose_group_is_stopped_end_themselves_and_remove_what_it_cannot(server: Server) -> None:
    """Stopped rather than killed: Ray, which would end them too, takes it for alive."""
    ranks = server.start(tensor=2, labels=[{"ray.io/node-id": server.ask("home")}])
    os.kill(server.pid, signal.SIGSTOP)
    try:
        until(lambda: not any(map(is_alive, ranks.pids)))
        assert not ranks.folder.exists()
    finally:
        os.kill(server.pid, signal.SIGCONT)
    until(lambda: server.ask("failure") is not None)
    server.ask("close")
    server.leaves_nothing()
