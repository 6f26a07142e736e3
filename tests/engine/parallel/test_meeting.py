"""Ranks meet at one address and listen nowhere else; who does not come is waited for no longer than told."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from deployments import liveness
from engine.errors import RanksLost
from engine.machine import CoreShare
from engine.parallel import meeting
from engine.parallel.meeting import Meeting
from engine.parallel.place import Place
from engine.parallel.slices import TensorRank
from tests.engine.parallel.pool import free_port

SOON = timedelta(seconds=1)


def place(rank: int, size: int = 2) -> Place:
    return Place(0, 1, range(1), TensorRank(rank, size))


def meet(port: int, size: int = 2, timeout: timedelta = timedelta(seconds=30)) -> list[Meeting]:
    with ThreadPoolExecutor(size) as threads:
        return list(
            threads.map(lambda rank: Meeting(place(rank, size), f"tcp://127.0.0.1:{port}", timeout), range(size))
        )


@pytest.mark.parametrize("rendezvous", ["127.0.0.1:80", "http://127.0.0.1:80", "tcp://127.0.0.1", "tcp://h:port", ""])
def test_an_address_of_another_form_is_told_what_is_expected(rendezvous: str) -> None:
    with pytest.raises(ValueError, match='expected "tcp://HOST:PORT"'):
        Meeting(place(0), rendezvous)


def test_ranks_of_one_machine_know_that_they_share_its_cores() -> None:
    assert [meeting.share for meeting in meet(free_port(), 3)] == [CoreShare(rank, 3) for rank in range(3)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_alone_gives_up_in_time(rank: int) -> None:
    began = time.monotonic()
    with pytest.raises(RanksLost, match=f"rank {rank} of 2 met nobody at tcp://127.0.0.1"):
        Meeting(place(rank), f"tcp://127.0.0.1:{free_port()}", SOON)
    assert time.monotonic() - began < 20


def test_a_taken_port_is_an_error_that_names_it() -> None:
    port = free_port()
    kept = meet(port)
    with pytest.raises(RanksLost, match=str(port)):
        Meeting(place(0), f"tcp://127.0.0.1:{port}", SOON)
    assert kept


def test_ranks_that_have_come_are_waited_for_longer_than_a_first_step_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are found to be lost by their pulse, long before."""
    first_step_s = liveness.FIRST_S + 4096 * liveness.FIRST_TOKEN_S
    assert meeting.TIMEOUT.total_seconds() > first_step_s
    monkeypatch.setattr(meeting, "ARRIVAL_TIMEOUT", SOON)
    first, second = meet(free_port(), timeout=meeting.TIMEOUT)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(first.store("slow").get, "weights")
        time.sleep(2 * SOON.total_seconds())
        assert not waiting.done()
        second.store("slow").set("weights", "read")
        assert waiting.result(10) == b"read"


def test_waiting_for_all_ends_when_all_have_come_or_time_is_up() -> None:
    first, second = meet(free_port())
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(first.wait_for_all, "here", timedelta(seconds=20))
        time.sleep(0.2)
        assert not waiting.done()
        second.wait_for_all("here", timedelta(seconds=20))
        waiting.result(10)
    with pytest.raises(RanksLost, match="rank 0 waited for the others"):
        first.wait_for_all("nobody else", SOON)


def test_nothing_listens_at_other_addresses_of_the_machine() -> None:
    port = free_port()
    meetings = meet(port)
    with ThreadPoolExecutor(2) as threads:
        groups = list(threads.map(lambda rank: meetings[rank].connect("all", rank, 2, torch.device("cpu")), range(2)))
    sockets = set()
    own = {Path(link).readlink().as_posix() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
            sockets.add(fields[1].partition(":")[0])
    assert sockets == {"0100007F"}, "listening sockets of this process, by address"
    assert groups
