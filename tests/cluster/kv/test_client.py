"""A replica's client and a real host in a process of its own: pages go out and come back, or are honestly missing."""

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from numpy.typing import NDArray

from cluster.kv.client import ANSWER_TIMEOUT_S, UNLIMITED, Bandwidth, TierClient
from cluster.kv.segment import Segment
from engine.kv.tier import Load, Loaded, Save, Saved
from tests.cluster.kv.answers import answers_of
from tests.cluster.kv.hosts import PATIENCE_S, Host, eventually

PAGE_BYTES = 5000
LAYOUT = b"L" * 32


class Pages:
    """Pages of a device: half to save, half to load into."""

    def __init__(self, count: int, page_bytes: int = PAGE_BYTES) -> None:
        self.page_bytes = page_bytes
        chance = np.random.default_rng(1)
        self.bytes: NDArray[np.uint8] = chance.integers(0, 255, (2 * count, page_bytes)).astype(np.uint8)

    def read(self, page: int, target: NDArray[np.uint8]) -> None:
        np.copyto(target, self.bytes[page])

    def write(self, page: int, source: NDArray[np.uint8]) -> None:
        np.copyto(self.bytes[page], source)


@pytest.fixture
def connect(host: Host) -> Iterator[Callable[..., TierClient]]:
    clients: list[TierClient] = []

    def make(
        pages: Pages, *, layout: bytes = LAYOUT, bandwidth: Bandwidth = UNLIMITED, connected: bool = True
    ) -> TierClient:
        client = TierClient(lambda: host.socket, layout, pages, name="test", bandwidth=bandwidth)
        clients.append(client)
        if connected:
            eventually(lambda: client.connected)
        return client

    yield make
    for client in clients:
        client.close()


def keys_of(count: int, chain: str = "a") -> list[bytes]:
    return [hashlib.sha256(f"{chain} {number}".encode()).digest() for number in range(count)]


def save(client: TierClient, keys: Sequence[bytes]) -> list[bool]:
    """Saves pages 0, 1, ... under these keys, as room comes; whether each was stored."""
    stored: dict[int, bool] = {}
    waiting = [Save(key, keys[page - 1] if page else b"", page) for page, key in enumerate(keys)]
    while len(stored) < len(keys):
        now, waiting = waiting[: client.room()], waiting[client.room() :]
        if now:
            client.save(now)
        for answer in client.poll(0.05):
            assert isinstance(answer, Saved)
            stored[answer.page] = answer.stored
    return [stored[page] for page in range(len(keys))]


def load(client: TierClient, keys: list[bytes], first_page: int) -> Loaded:
    """Loads pages into first_page, first_page + 1, ...; computing them would take very long."""
    client.load(Load(1, keys, list(range(first_page, first_page + len(keys))), lambda count: 1e6 * (len(keys) - count)))
    (answer,) = answers_of(client, 1)
    assert isinstance(answer, Loaded)
    return answer


def mapped_shared_bytes() -> int:
    """Of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssShmem"))
    return int(line.split()[1]) * 1024


def test_pages_outlive_the_replica_that_saved_them(host: Host, connect: Callable[..., TierClient]) -> None:
    host.start()
    pages, keys = Pages(40), keys_of(40)
    first = connect(pages)
    assert all(save(first, keys))
    assert first.stats().pages_saved == 40
    eventually(lambda: first.may_have(keys[-1]))
    first.close()
    second = connect(pages)
    loaded = load(second, keys, first_page=40)
    assert loaded.num_pages == 40
    assert loaded.seconds > 0
    assert loaded.recompute_seconds == pytest.approx(40e6)
    assert np.array_equal(pages.bytes[40:], pages.bytes[:40])


def test_a_replica_maps_no_page_and_so_its_death_is_noticed_at_once(
    host: Host, connect: Callable[..., TierClient]
) -> None:
    host.start("64MiB")
    pages, keys = Pages(40, page_bytes=2**20), keys_of(40)
    client = connect(pages)
    before = mapped_shared_bytes()
    assert all(save(client, keys))
    assert load(client, keys, first_page=40).num_pages == 40
    assert np.array_equal(pages.bytes[40:], pages.bytes[:40])
    assert mapped_shared_bytes() - before < 2**20


def test_only_the_first_pages_that_are_there_in_one_run_are_loaded(
    host: Host, connect: Callable[..., TierClient]
) -> None:
    host.start()
    pages, keys = Pages(8), keys_of(8)
    client = connect(pages)
    save(client, keys[:3])
    before = pages.bytes[11:].copy()
    assert load(client, [*keys[:3], *keys_of(2, "b"), keys[1]], first_page=8).num_pages == 3
    assert np.array_equal(pages.bytes[8:11], pages.bytes[:3])
    assert np.array_equal(pages.bytes[11:], before)
    assert not client.may_have(keys_of(1, "b")[0])


def test_what_is_faster_to_compute_is_not_loaded(host: Host, connect: Callable[..., TierClient]) -> None:
    host.start()
    pages, keys = Pages(4), keys_of(4)
    client = connect(pages)
    save(client, keys)
    client.load(Load(1, keys, [4, 5, 6, 7], lambda count: 0.0))
    assert answers_of(client, 1) == [Loaded(1, 0, pytest.approx(0.0, abs=PATIENCE_S), pytest.approx(0.0, abs=1.0), 0.0)]


def test_replicas_of_other_models_find_nothing(host: Host, connect: Callable[..., TierClient]) -> None:
    host.start("2MiB")
    pages, keys = Pages(4), keys_of(4)
    client = connect(pages)
    save(client, keys)
    client.close()
    other = connect(pages, layout=b"M" * 32)
    assert load(other, keys, first_page=4).num_pages == 0


def test_a_page_that_changed_in_memory_is_not_used_and_not_offered_again(
    host: Host, connect: Callable[..., TierClient]
) -> None:
    host.start()
    pages, keys = Pages(6), keys_of(6)
    client = connect(pages)
    save(client, keys)
    eventually(lambda: client.may_have(keys[3]))
    (path,) = host.segments.glob("manta-kv-*")
    segment = Segment.attach(path)
    slot = next(slot for slot in range(segment.num_slots) if np.array_equal(segment.slot(slot), pages.bytes[3]))
    segment.slot(slot)[100] ^= 1
    segment.close()
    assert load(client, keys, first_page=6).num_pages == 3
    assert client.stats().pages_corrupt == 1
    eventually(lambda: not client.may_have(keys[3]))
    assert load(client, keys, first_page=6).num_pages == 3
    assert client.stats().pages_corrupt == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_without_its_host_a_client_has_nothing_until_the_host_is_back(
    host: Host, connect: Callable[..., TierClient], how: signal.Signals
) -> None:
    host.start()
    pages, keys = Pages(4), keys_of(4)
    client = connect(pages)
    assert client.host() == 1
    save(client, keys)
    host.stop(how)
    eventually(lambda: not client.connected)
    assert client.host() == 0
    assert not client.may_have(keys[0])
    assert load(client, keys, first_page=4).num_pages == 0
    assert save(client, keys) == [False] * 4
    assert client.stats().failures == 1
    assert client.stats().pages_refused == 4
    host.start()
    eventually(lambda: client.connected)
    assert client.host() == 2, "what the first one had is gone"
    assert all(save(client, keys))
    assert load(client, keys, first_page=4).num_pages == 4


def test_pages_that_nobody_took_while_the_host_was_away_use_up_no_bandwidth(
    host: Host, connect: Callable[..., TierClient]
) -> None:
    pages, keys = Pages(30), keys_of(30)
    client = connect(pages, bandwidth=Bandwidth(save=40 * PAGE_BYTES), connected=False)
    for _ in range(20):
        assert save(client, keys) == [False] * 30
    host.start()
    eventually(lambda: client.connected)
    assert client.room() > 0
    begin = time.monotonic()
    assert all(save(client, keys))
    assert time.monotonic() - begin < 2.0, "30 pages at 40 a second; with those that were refused it would be 15 s"


def test_a_host_that_stops_answering_costs_a_load_seconds_and_no_more(
    host: Host, connect: Callable[..., TierClient]
) -> None:
    host.start()
    pages, keys = Pages(4), keys_of(4)
    client = connect(pages)
    save(client, keys)
    host.send(signal.SIGSTOP)
    assert load(client, keys, first_page=4).num_pages == 0
    assert not client.connected


def save_to_a_disk_that_hangs(client: TierClient, folder: Path) -> list[list[bytes]]:
    """Saves eight times 8 pages, the first of which are on disk then; the very first of all hangs whoever reads it."""
    chains = [keys_of(8, name) for name in "abcdefgh"]
    files = [[folder / LAYOUT.hex() / f"{key.hex()}.page" for key in keys] for keys in chains]
    for keys in chains:
        assert all(save(client, keys))
    eventually(lambda: all(file.exists() for file in (*files[0], *files[1])))
    files[0][0].unlink()
    os.mkfifo(files[0][0])  # to open it is to wait for somebody who writes
    return chains


def test_a_load_of_which_nothing_is_heard_ends_alone(
    host: Host, connect: Callable[..., TierClient], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.kv.client.ANSWER_TIMEOUT_S", 1.0)
    host.start("512KiB", "--disk", str(tmp_path), "--disk-bytes", "4MiB")
    pages = Pages(8)
    client = connect(pages)
    chains = save_to_a_disk_that_hangs(client, tmp_path)
    assert load(client, chains[0], first_page=8).num_pages == 0
    assert load(client, chains[-1], first_page=8).num_pages == 8
    assert np.array_equal(pages.bytes[8:], pages.bytes[:8])
    assert client.connected and client.stats().failures == 0
    host.stop(signal.SIGKILL)


def test_a_disk_that_hangs_costs_one_load_seconds_and_is_offered_no_more(
    host: Host, connect: Callable[..., TierClient], tmp_path: Path
) -> None:
    host.start("512KiB", "--disk", str(tmp_path), "--disk-bytes", "4MiB")
    client = connect(Pages(8))
    chains = save_to_a_disk_that_hangs(client, tmp_path)
    assert client.may_have(chains[0][0]) and client.may_have(chains[1][0])
    loaded = load(client, chains[0], first_page=8)
    assert loaded.num_pages == 0 and loaded.seconds < ANSWER_TIMEOUT_S
    assert not client.may_have(chains[0][0]) and not client.may_have(chains[1][0])
    assert load(client, chains[-1], first_page=8).num_pages == 8
    assert client.connected and client.stats().failures == 0
    host.stop(signal.SIGKILL)


def test_more_pages_than_the_host_holds_leave_the_beginnings_findable(
    host: Host, connect: Callable[..., TierClient]
) -> None:
    host.start("256KiB")
    pages, keys = Pages(100), keys_of(100)
    client = connect(pages)
    stored = save(client, keys)
    assert stored == sorted(stored, reverse=True), "nothing that nobody could find is said to be there"
    loaded = load(client, keys, first_page=100)
    assert 0 < loaded.num_pages <= stored.count(True) <= 31
    assert np.array_equal(pages.bytes[100 : 100 + loaded.num_pages], pages.bytes[: loaded.num_pages])


def test_a_page_that_is_dropped_for_want_of_the_one_before_it_is_not_taken_for_saved(
    host: Host, connect: Callable[..., TierClient]
) -> None:
    host.start("512KiB")
    pages, keys = Pages(8), keys_of(8)
    client = connect(pages)
    assert all(save(client, keys[:4]))
    client.save([Save(keys[6], keys[5], 6), Save(keys[7], keys[6], 7), Save(keys[4], keys[3], 4)])
    assert answers_of(client, 3) == [Saved(6, False), Saved(7, False), Saved(4, True)]
    assert (client.stats().pages_saved, client.stats().pages_refused) == (5, 2)
    client.save([Save(keys[page], keys[page - 1], page) for page in (5, 6, 7)])
    assert answers_of(client, 3) == [Saved(page, True) for page in (5, 6, 7)]
    assert load(client, keys, first_page=8).num_pages == 8


def test_a_chunk_that_fills_more_pages_than_there_are_slots_is_taken_and_saved_whole(
    host: Host, connect: Callable[..., TierClient]
) -> None:
    host.start("2MiB")  # room for the pages and for the slots that the client holds
    pages, keys = Pages(100), keys_of(100)
    client = connect(pages)
    assert client.room() >= 100
    client.save([Save(key, keys[page - 1] if page else b"", page) for page, key in enumerate(keys)])
    answers = answers_of(client, 100)
    assert answers == [Saved(page, True) for page in range(100)], "oldest first: a load ends at the first gap"
    assert load(client, keys, first_page=100).num_pages == 100
    assert np.array_equal(pages.bytes[100:], pages.bytes[:100])


def test_pages_that_wait_for_slots_of_a_silent_host_are_given_back(
    host: Host, connect: Callable[..., TierClient]
) -> None:
    host.start("2MiB")  # room for the pages and for the slots that the client holds
    pages, keys = Pages(100), keys_of(100)
    client = connect(pages)
    save(client, keys[:1])
    host.send(signal.SIGSTOP)
    client.save([Save(keys[page], keys[page - 1], page) for page in range(1, 100)])
    assert not any(answer.stored for answer in answers_of(client, 99)), "nobody has said that they are"
    assert client.connected and client.stats().pages_saved == 1
    assert client.room() == 0, "what nobody takes waits where it is found"
    host.send(signal.SIGCONT)
    eventually(lambda: client.room() >= 100)
    assert all(save(client, keys))
    assert load(client, keys, first_page=100).num_pages == 100


@pytest.mark.parametrize(("given_up", "again"), [(slice(5, 20), slice(0, 15)), (slice(0, 15), slice(5, 10))])
def test_what_a_silent_host_says_later_of_a_load_is_not_taken_for_the_next_of_its_ticket(
    host: Host, connect: Callable[..., TierClient], given_up: slice, again: slice
) -> None:
    host.start("2MiB")
    pages, keys = Pages(20), keys_of(20)
    client = connect(pages)
    assert all(save(client, keys))
    host.send(signal.SIGSTOP)
    client.load(Load(1, keys[given_up], list(range(20, 35)), lambda count: 1e6 * (20 - count)))
    assert not client.poll(0.2)
    client.give_up(1)
    assert answers_of(client, 1) == [Loaded(1, 0, ANY, 0.0, 0.0)]
    client.load(Load(1, keys[again], list(range(20, 35)), lambda count: 1e6 * (20 - count)))
    assert not client.poll(0.2)
    host.send(signal.SIGCONT)
    (answer,) = answers_of(client, 1)
    expected = pages.bytes[:20][again]
    assert isinstance(answer, Loaded) and answer.num_pages == len(expected)
    assert np.array_equal(pages.bytes[20 : 20 + len(expected)], expected)
    assert client.stats().failures == 0


def test_saving_keeps_to_its_bandwidth(host: Host, connect: Callable[..., TierClient]) -> None:
    host.start()
    pages, keys = Pages(30), keys_of(30)
    client = connect(pages, bandwidth=Bandwidth(save=40 * PAGE_BYTES))
    begin = time.monotonic()
    save(client, keys)
    assert time.monotonic() - begin > 0.4, "30 pages at 40 a second, the first 10 at once"


def test_a_host_with_too_little_memory_is_as_good_as_none(host: Host, connect: Callable[..., TierClient]) -> None:
    host.start("16KiB")
    pages = Pages(2, page_bytes=1 << 20)
    client = connect(pages, connected=False)
    assert save(client, keys_of(2)) == [False, False]
    assert load(client, keys_of(2), first_page=2).num_pages == 0
