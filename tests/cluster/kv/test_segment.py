"""The shared memory of a node: seen alike from both sides, and refused where it is not ours or not whole."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kv.segment import BLOCK, Segment, SegmentError, remove_dead, segment_bytes
from cluster.kv.tags import hide, show

KEY = bytes(range(32))


@pytest.fixture
def segment(tmp_path: Path):
    made = Segment.create(tmp_path / "manta-kv-test", num_slots=5, page_bytes=5000, num_disk=3)
    yield made
    made.close()


def test_both_sides_see_the_same_pages_and_tags(segment: Segment) -> None:
    attached = Segment.attach(segment.path)
    assert (attached.num_slots, attached.page_bytes, attached.num_disk) == (5, 5000, 3)
    for index in range(5):
        attached.slot(index)[:] = index + 1
    for index in range(5):
        assert (segment.slot(index) == index + 1).all() and segment.slot(index).shape == (5000,)
    segment.tags[:] = 1
    segment.disk_tags[:] = 2
    assert (attached.tags == 1).all() and (attached.disk_tags == 2).all()
    assert (attached.slot(0) == 1).all(), "tags lie beside the pages"


def test_what_is_copied_through_the_file_is_what_lies_in_the_slots(segment: Segment) -> None:
    attached = Segment.attach(segment.path)
    attached.write(3, np.full(5000, 7, np.uint8))
    assert (segment.slot(3) == 7).all() and not segment.slot(2).any() and not segment.slot(4).any()
    segment.slot(3)[4999] = 8
    copied = np.zeros(5000, np.uint8)
    attached.read(3, copied)
    assert np.array_equal(copied, segment.slot(3))


def test_a_segment_that_was_cut_off_gives_no_part_of_a_page(segment: Segment) -> None:
    attached = Segment.attach(segment.path)
    os.truncate(segment.path, segment.path.stat().st_size - 8192)
    with pytest.raises(SegmentError, match="0 of 5000 bytes of slot 4"):
        attached.read(4, np.zeros(5000, np.uint8))


def test_the_format_is_the_one_that_is_written_down(segment: Segment) -> None:
    segment.slot(1)[:] = 7
    show(segment.tags, KEY)
    content = segment.path.read_bytes()
    assert content[:8] == b"MANTAKV2"
    assert [int.from_bytes(content[at : at + 8], "little") for at in range(8, 40, 8)] == [5, 5000, 8192, 3]
    assert content[BLOCK : BLOCK + 8] == KEY[:8]
    pages = 2 * BLOCK
    assert content[pages : pages + 8192] == bytes(8192)
    assert content[pages + 8192 : pages + 8192 + 5000] == bytes([7]) * 5000
    assert len(content) == pages + 5 * 8192


@settings(max_examples=30)
@given(num_slots=st.integers(1, 2000), page_bytes=st.integers(1, 9000), num_disk=st.integers(0, 2000))
def test_slots_never_overlap_nor_leave_the_file(
    num_slots: int, page_bytes: int, num_disk: int, tmp_path_factory
) -> None:
    path = tmp_path_factory.mktemp("segments") / "manta-kv-x"
    segment = Segment.create(path, num_slots, page_bytes, num_disk)
    try:
        assert path.stat().st_size == segment_bytes(num_slots, page_bytes, num_disk)
        base = segment.slot(0).__array_interface__["data"][0]
        last = segment.slot(num_slots - 1)
        assert last.__array_interface__["data"][0] - base == (num_slots - 1) * segment.stride
        assert segment.stride >= page_bytes and segment.stride % BLOCK == 0
        last[-1] = 1
        assert not segment.tags.any() and not segment.disk_tags.any()
    finally:
        segment.close()
        segment.unlink()


def test_memory_is_committed_as_it_is_written(tmp_path: Path) -> None:
    segment = Segment.create(tmp_path / "manta-kv-x", num_slots=256, page_bytes=2**20, num_disk=0)
    assert segment.path.stat().st_blocks * 512 < 2**20
    assert segment.commit(3)
    assert 2**20 <= segment.path.stat().st_blocks * 512 < 2 * 2**20
    segment.close()


def test_may_have_is_true_of_pages_in_memory_and_on_disk(segment: Segment) -> None:
    attached = Segment.attach(segment.path)
    assert not attached.may_have(KEY)
    show(segment.tags, KEY)
    assert attached.may_have(KEY)
    hide(segment.tags, KEY)
    assert not attached.may_have(KEY)
    show(segment.disk_tags, KEY)
    assert attached.may_have(KEY) and not attached.may_have(KEY[::-1])


@pytest.mark.parametrize("index", [-1, 5])
def test_there_are_no_slots_but_those_of_the_segment(segment: Segment, index: int) -> None:
    page = np.zeros(5000, np.uint8)
    for use in (segment.slot, lambda place: segment.read(place, page), lambda place: segment.write(place, page)):
        with pytest.raises(IndexError, match="there is no slot"):
            use(index)


def test_a_view_outlives_closing_and_unlinking(segment: Segment) -> None:
    view = segment.slot(2)
    segment.slot(2)[:] = 9
    segment.close()
    segment.close()
    segment.unlink()
    assert (view == 9).all()
    with pytest.raises(IndexError):
        segment.slot(2)


class TestForeignFiles:
    def test_a_file_of_something_else_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "other"
        path.write_bytes(b"something else entirely" * 1000)
        path.chmod(0o600)
        with pytest.raises(SegmentError, match="does not begin with"):
            Segment.attach(path)

    def test_an_empty_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "empty"
        path.touch(0o600)
        with pytest.raises(SegmentError, match="does not begin with"):
            Segment.attach(path)

    def test_a_truncated_segment_is_refused(self, segment: Segment) -> None:
        os.truncate(segment.path, segment.path.stat().st_size - BLOCK)
        with pytest.raises(SegmentError, match="do not make a file of"):
            Segment.attach(segment.path)

    @pytest.mark.parametrize("place", [8, 16, 24, 32])
    def test_a_header_that_does_not_fit_its_file_is_refused(self, segment: Segment, place: int) -> None:
        for value in (0, 2**40, 2**63):
            with segment.path.open("r+b") as file:
                file.seek(place)
                before = file.read(8)
                file.seek(place)
                file.write((value or 123456).to_bytes(8, "little"))
            with pytest.raises(SegmentError):
                Segment.attach(segment.path)
            with segment.path.open("r+b") as file:
                file.seek(place)
                file.write(before)
        Segment.attach(segment.path).close()

    def test_a_segment_that_others_may_read_is_refused(self, segment: Segment) -> None:
        assert segment.path.stat().st_mode & 0o777 == 0o600
        segment.path.chmod(0o640)
        with pytest.raises(SegmentError, match="mode 0640"):
            Segment.attach(segment.path)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    def test_a_segment_of_another_user_is_refused(self, segment: Segment) -> None:
        os.chown(segment.path, 12345, -1)
        with pytest.raises(SegmentError, match="found user 12345"):
            Segment.attach(segment.path)

    def test_a_link_is_not_followed(self, segment: Segment, tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(segment.path)
        with pytest.raises(SegmentError, match="cannot be opened"):
            Segment.attach(link)

    def test_a_file_that_is_there_already_is_not_taken_over(self, segment: Segment) -> None:
        with pytest.raises(SegmentError, match="File exists"):
            Segment.create(segment.path, 1, 1, 0)

    def test_a_segment_larger_than_files_can_be_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(SegmentError, match="impossible"):
            Segment.create(tmp_path / "manta-kv-huge", 2**31, 4096, 0)
        assert not list(tmp_path.iterdir())


def test_segments_of_dead_hosts_are_removed_and_those_of_living_ones_stay(tmp_path: Path, segment: Segment) -> None:
    code = (
        "import sys; from pathlib import Path; from cluster.kv.segment import Segment\n"
        f"segment = Segment.create(Path({str(tmp_path / 'manta-kv-dead')!r}), 1, 1, 0)\n"
        "print('made', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"made\n"
    stranger = tmp_path / "manta-something-else"
    stranger.touch()
    assert remove_dead(tmp_path) == []
    other.kill()
    other.communicate()
    assert remove_dead(tmp_path) == [tmp_path / "manta-kv-dead"]
    assert segment.path.exists() and stranger.exists()
    assert np.array_equal(Segment.attach(segment.path).slot(0), segment.slot(0))
