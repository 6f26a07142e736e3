"""What may be chosen about the KV hosts, in a file and on the command line."""

from pathlib import Path

import pytest

from cluster.config import KVTierConfig
from cluster.kv_host import resolve
from deployments.cli.errors import CommandError
from deployments.cli.serve import configure


def test_sizes_are_written_as_people_write_them() -> None:
    config = configure(None, {"kv_host.memory": "2GiB", "kv_host.disk": Path("/d"), "kv_host.disk_size": "1TB"}).kv_host
    assert (config.memory, config.disk, config.disk_size) == (2**31, Path("/d"), 10**12)
    assert resolve(config).memory_bytes == 2**31 and config.enabled


def test_a_file_has_the_same_fields(tmp_path: Path) -> None:
    file = tmp_path / "app.yaml"
    file.write_text("kv_host: {memory: 0, disk: /d}")
    config = configure(file, {}).kv_host
    assert not config.enabled and config.disk == Path("/d")


@pytest.mark.parametrize("memory", ["-1", "much", -5])
def test_what_is_no_size_is_refused(memory: object) -> None:
    with pytest.raises(CommandError, match=r"kv_host\.memory"):
        configure(None, {"kv_host.memory": memory})


def test_auto_is_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.kv_host.available_bytes", lambda: 8 * 2**30)
    assert resolve(KVTierConfig()).memory_bytes == 2 * 2**30
