"""What the log says of streams that left their replicas."""

from pathlib import Path

from benchmarks.drain import departures


def test_streams_that_were_moved_are_told_from_those_that_were_lost(tmp_path: Path) -> None:
    log = tmp_path / "manta.log"
    log.write_text(
        "10:00:00 INFO gateway: 16 requests leave their replica: replica abc is to go\n"
        "10:00:01 WARNING gateway: 3 requests leave their replica: replica def is gone\n"
        "10:00:02 INFO gateway: Request r goes on elsewhere: replica abc is to go\n"
        "10:00:03 INFO gateway: 32 requests leave their replica: replica ghi is to go\n"
    )
    assert departures(log) == (48, 3)
