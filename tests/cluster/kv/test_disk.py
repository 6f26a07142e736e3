"""Pages as files: found again after a restart, and never handed out damaged, whatever is done to the files."""

import asyncio
import errno
import itertools
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from cluster.kv.checksum import crc32c
from cluster.kv.disk import DiskTier, LayoutDisk, file_bytes
from cluster.kv.page_file import HEADER_BYTES, PageFileError, PageHeader, file_name, open_new, read_page, write_page
from cluster.kv.slots import Page
from cluster.kv.stats import HostCounters
from cluster.kv.tags import new_table
from tests.cluster.kv.talk import LAYOUT, PAGE_BYTES, chain, content_of, key_of

pytestmark = pytest.mark.anyio
OTHER = LAYOUT[::-1]
WHOLE = HEADER_BYTES + PAGE_BYTES


def page_of(name: str) -> tuple[Page, np.ndarray]:
    content = content_of(name)
    parent = key_of(name[:-1]) if name.endswith("+") else b""
    return Page(0, key_of(name), parent, crc32c(content), 0), content


async def write(disk: LayoutDisk, *names: str) -> None:
    for name in names:
        await disk.write([page_of(name)])


async def read(disk: LayoutDisk, *names: str) -> list[bool]:
    """Which of these can be read; asserts that those which can are right."""
    views = [np.zeros(PAGE_BYTES, dtype=np.uint8) for _ in names]
    headers = await disk.read([key_of(name) for name in names], views)
    for name, view, header in zip(names, views, headers, strict=True):
        if header is not None:
            page, content = page_of(name)
            assert header == (page.parent, page.crc) and np.array_equal(view, content)
    return [header is not None for header in headers]


async def opened(root: Path, pages: int = 100, **options) -> tuple[DiskTier, LayoutDisk]:
    tier = DiskTier(root, pages * file_bytes(PAGE_BYTES), HostCounters(), **options)
    await tier.start()
    disk = await tier.open(LAYOUT, PAGE_BYTES)
    assert disk is not None
    return tier, disk


async def closed(tier: DiskTier, disk: LayoutDisk) -> None:
    await disk.close()
    await tier.close()


def files(root: Path) -> list[Path]:
    return sorted(root.glob("*/*.page"))


async def test_pages_survive_a_restart(tmp_path: Path) -> None:
    tier, disk = await opened(tmp_path / "deep" / "tier")
    await write(disk, *chain("a", 4))
    assert all(await read(disk, *chain("a", 4)))
    await closed(tier, disk)

    tier, disk = await opened(tmp_path / "deep" / "tier")
    assert all(key_of(name) in disk for name in chain("a", 4))
    assert all(await read(disk, *chain("a", 4)))
    assert (tier.num_pages, tier.num_bytes) == (4, 4 * file_bytes(PAGE_BYTES))
    assert not (await read(disk, "unknown"))[0]
    tags = new_table(disk.table.num_slots)
    disk.show_tags(tags)
    assert sorted(tags[tags > 0]) == sorted(int.from_bytes(key_of(name)[:8], "little") for name in chain("a", 4))


async def test_files_are_private(tmp_path: Path) -> None:
    _, disk = await opened(tmp_path / "tier")
    await write(disk, "a")
    (file,) = files(tmp_path / "tier")
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == file.parent.parent.stat().st_mode & 0o777 == 0o700


async def test_the_budget_is_kept_and_leaves_go_first(tmp_path: Path) -> None:
    tier, disk = await opened(tmp_path, pages=6)
    tags = new_table(6)
    disk.show_tags(tags)
    await write(disk, *chain("a", 3), *chain("b", 3))
    assert all(await read(disk, *chain("b", 3)))
    await write(disk, "c", "d")
    assert await read(disk, "a", "a+", "a++", *chain("b", 3)) == [True, False, False, True, True, True]
    await tier.write_thread(lambda: None)
    assert len(files(tmp_path)) == 6 and sum(file.stat().st_size for file in files(tmp_path)) <= tier.num_bytes
    assert np.count_nonzero(tags) == 6


async def test_more_files_than_the_budget_has_room_for_are_deleted_at_the_start(tmp_path: Path) -> None:
    tier, disk = await opened(tmp_path)
    await write(disk, "a", "b", "c", "d")
    for age, name in enumerate("abcd"):
        path = tmp_path / LAYOUT.hex() / file_name(key_of(name))
        os.utime(path, (1000 + age, 1000 + age))
    await closed(tier, disk)
    tier, disk = await opened(tmp_path, pages=2)
    assert [key_of(name) in disk for name in "abcd"] == [False, False, True, True]
    await tier.write_thread(lambda: None)
    assert len(files(tmp_path)) == 2


class TestDamage:
    async def test_every_flipped_bit_is_noticed(self, tmp_path: Path) -> None:
        header = PageHeader(LAYOUT, key_of("a+"), key_of("a"), 64, crc32c(content_of("a+", 64)))
        write_page(tmp_path, header, content_of("a+", 64))
        path = tmp_path / file_name(header.key)
        whole = path.read_bytes()
        view = np.zeros(64, dtype=np.uint8)
        assert read_page(tmp_path, LAYOUT, header.key, view) == header
        # What lies between the header's fields and the page says nothing.
        meaning = [*range(125), *range(HEADER_BYTES, len(whole))]
        for place, bit in itertools.product(meaning, range(8)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(PageFileError):
                read_page(tmp_path, LAYOUT, header.key, view)

    async def test_a_flipped_bit_deletes_the_page_and_is_counted(self, tmp_path: Path) -> None:
        tier, disk = await opened(tmp_path)
        await write(disk, "a", "b")
        path = tmp_path / LAYOUT.hex() / file_name(key_of("a"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert await read(disk, "a", "b") == [False, True]
        assert key_of("a") not in disk and tier.counters.corrupt_total == 1
        await tier.write_thread(lambda: None)
        assert not path.exists()
        await write(disk, "a")
        assert await read(disk, "a") == [True]

    @pytest.mark.parametrize(
        "length", [0, 10, HEADER_BYTES, HEADER_BYTES + PAGE_BYTES - 1, HEADER_BYTES + PAGE_BYTES + 1]
    )
    @pytest.mark.parametrize("restart", [False, True])
    async def test_a_file_of_another_length_is_deleted(self, tmp_path: Path, length: int, restart: bool) -> None:
        tier, disk = await opened(tmp_path)
        await write(disk, "a")
        os.truncate(files(tmp_path)[0], length)
        if restart:
            await closed(tier, disk)
            tier, disk = await opened(tmp_path)
        else:
            assert await read(disk, "a") == [False]
        assert key_of("a") not in disk and tier.counters.corrupt_total == 1
        await tier.write_thread(lambda: None)
        assert not files(tmp_path)

    @pytest.mark.parametrize("restart", [False, True])
    async def test_files_that_were_swapped_are_deleted(self, tmp_path: Path, restart: bool) -> None:
        tier, disk = await opened(tmp_path)
        await write(disk, "a", "b")
        one, two = files(tmp_path)
        one.rename(tmp_path / "x")
        two.rename(one)
        (tmp_path / "x").rename(two)
        if restart:
            await closed(tier, disk)
            tier, disk = await opened(tmp_path)
        assert await read(disk, "a", "b") == [False, False]
        assert tier.counters.corrupt_total == 2

    async def test_a_page_of_another_layout_is_no_page_of_this_one(self, tmp_path: Path) -> None:
        tier, disk = await opened(tmp_path)
        await write(disk, "a")
        (file,) = files(tmp_path)
        await closed(tier, disk)
        (tmp_path / OTHER.hex()).mkdir()
        file.rename(tmp_path / OTHER.hex() / file.name)
        tier = DiskTier(tmp_path, 2**20, HostCounters())
        await tier.start()
        other = await tier.open(OTHER, PAGE_BYTES)
        assert other is not None and key_of("a") not in other and tier.counters.corrupt_total == 1

    async def test_a_file_that_vanished_is_not_looked_for_again(self, tmp_path: Path) -> None:
        tier, disk = await opened(tmp_path)
        await write(disk, "a")
        files(tmp_path)[0].unlink()
        assert await read(disk, "a") == [False]
        assert key_of("a") not in disk and tier.counters.disk_errors_total == 1

    async def test_what_was_being_written_when_the_host_died_is_removed(self, tmp_path: Path) -> None:
        (tmp_path / LAYOUT.hex()).mkdir()
        unfinished = (tmp_path / LAYOUT.hex() / file_name(key_of("a"))).with_suffix(".tmp")
        unfinished.write_bytes(b"half")
        tier, disk = await opened(tmp_path)
        assert not unfinished.exists() and tier.num_pages == 0
        assert key_of("a") not in disk


class FullDisk:
    """Files that fail once so many bytes are written in all."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, path: Path) -> BinaryIO:
        file = open_new(path)
        disk = self

        class Bounded:
            def __enter__(self):
                return self

            def __exit__(self, *exception):
                file.close()

            def write(self, part: memoryview) -> int:
                if not disk.room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                count = file.write(part[: disk.room])
                disk.room -= count
                return count

        return Bounded()  # type: ignore[return-value]


async def test_a_full_disk_is_read_from_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier, disk = await opened(tmp_path, opener=FullDisk(2 * (HEADER_BYTES + PAGE_BYTES) + 5000))
    await write(disk, "a", "b", "c", "d")
    assert not disk.writable and tier.counters.disk_errors_total == 1
    assert [key_of(name) in disk for name in "abcd"] == [True, True, False, False]
    assert await read(disk, "a", "b") == [True, True]
    assert caplog.text.count("No space left on device") == 1
    assert not list(tmp_path.glob("*/*.tmp")), "half a file is left"
    disk.table.check_integrity()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_read_only_folder_is_read_from(tmp_path: Path) -> None:
    tier, disk = await opened(tmp_path)
    await write(disk, "a")
    await closed(tier, disk)
    tmp_path.chmod(0o500)
    tier, disk = await opened(tmp_path)
    assert not disk.writable and await read(disk, "a") == [True]
    tmp_path.chmod(0o700)


async def test_a_folder_that_is_read_only_is_read_from_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier, disk = await opened(tmp_path)
    await write(disk, "a")
    await closed(tier, disk)
    monkeypatch.setattr("cluster.kv.disk.os.access", lambda path, mode: False)
    tier, disk = await opened(tmp_path)
    await write(disk, "b")
    assert await read(disk, "a") == [True] and key_of("b") not in disk
    assert caplog.text.count("it is read-only") == 1


async def test_a_place_where_no_folder_can_be_is_said_and_nothing_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    tier, disk = await opened(tmp_path / "file" / "tier")
    await write(disk, "a")
    assert not tier.writable and key_of("a") not in disk
    assert caplog.text.count("cannot be written to") == 1
    await closed(tier, disk)


class TestLayouts:
    async def test_others_are_ignored_until_their_room_is_needed(self, tmp_path: Path) -> None:
        tier, disk = await opened(tmp_path, pages=10)
        await write(disk, *"abcdef")
        await closed(tier, disk)
        stranger = tmp_path / "notes"
        stranger.mkdir()
        (stranger / "a.page").touch()

        tier = DiskTier(tmp_path, 10 * file_bytes(PAGE_BYTES), HostCounters())
        await tier.start()
        other = await tier.open(OTHER, PAGE_BYTES)
        assert other is not None and other.table.num_slots == 10
        await write(other, *"stuv")
        assert len(files(tmp_path)) == 11 and tier.num_bytes == 10 * file_bytes(PAGE_BYTES)
        await write(other, "w")
        assert not (tmp_path / LAYOUT.hex()).exists()
        assert await read(other, *"stuvw") == [True] * 5
        assert (stranger / "a.page").exists()

    async def test_layouts_that_are_to_share_the_budget_get_equal_parts(self, tmp_path: Path) -> None:
        tier = DiskTier(tmp_path, 10 * file_bytes(PAGE_BYTES), HostCounters())
        await tier.start()
        disks = [await tier.open(layout, PAGE_BYTES, parts=2) for layout in (LAYOUT, OTHER)]
        assert [disk.table.num_slots for disk in disks if disk is not None] == [5, 5]
        for disk in disks:
            assert disk is not None
            await disk.close()
        await tier.close()

    async def test_those_in_use_share_the_budget(self, tmp_path: Path) -> None:
        tier, disk = await opened(tmp_path, pages=10)
        assert disk.table.num_slots == 10 and await tier.open(OTHER, PAGE_BYTES) is None
        await disk.close()
        other = await tier.open(OTHER, PAGE_BYTES)
        assert other is not None and other.table.num_slots == 10

    async def test_a_folder_belongs_to_one_host(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        tier, disk = await opened(tmp_path)
        second = DiskTier(tmp_path, 2**20, HostCounters())
        await second.start()
        assert await second.open(OTHER, PAGE_BYTES) is None
        assert "another host uses" in caplog.text
        await second.close()
        await closed(tier, disk)
        third, _ = await opened(tmp_path)
        assert third.writable


async def test_pages_being_read_are_not_evicted(tmp_path: Path) -> None:
    _, disk = await opened(tmp_path, pages=2)
    await write(disk, "a", "b")
    outcomes, *_ = await asyncio.gather(read(disk, "a", "b"), write(disk, "c"), write(disk, "d"))
    assert outcomes == [True, True]
    disk.table.check_integrity()
