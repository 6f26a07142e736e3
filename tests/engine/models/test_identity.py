"""When two model directories are the same model."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.errors import ModelError
from engine.models import identity
from engine.models.identity import PIECE_BYTES, SETTLED_S, model_identity


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checksums"


def write(folder: Path, weights: bytes, config: str = "{}") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> bytes:
    """The identity of a model of these tensors."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return model_identity(folder)


def test_the_same_files_elsewhere_are_the_same_model(tmp_path: Path) -> None:
    tensors = {"a": np.arange(100_000, dtype=np.int32), "b": np.ones(3, np.int16)}
    identities = {write_tensors(tmp_path / name, tensors) for name in "xy"}
    (tmp_path / "x" / "README.md").write_text("which is no part of it")
    assert identities == {model_identity(tmp_path / "x")}


def test_other_weights_other_settings_and_other_lengths_are_other_models(tmp_path: Path) -> None:
    models = [
        write(tmp_path / "a", b"w" * 5000),
        write(tmp_path / "b", b"w" * 4999 + b"x"),
        write(tmp_path / "c", b"w" * 5000, config='{"a": 1}'),
        write(tmp_path / "d", b"w" * 5001),
        write(tmp_path / "e", b"w" * 5000, config='{"vocabulary": "' + "a" * 10**6 + '"}'),
        write(tmp_path / "f", b"w" * 5000, config='{"vocabulary": "' + "a" * 500_001 + "b" + "a" * 499_998 + '"}'),
    ]
    assert len({model_identity(folder) for folder in models}) == len(models)


def test_a_revision_of_a_few_rows_is_another_model(tmp_path: Path) -> None:
    """As is one whose tensor is another part of a merged one."""
    embeddings = np.zeros((1500, 8192), np.int8)
    found = {write_tensors(tmp_path / "m", {"embeddings": embeddings})}
    rows = [0, 1, 333, 511, 512, 767, 1024, 1499]
    for row in rows:
        embeddings[row, row] = 1
        found.add(write_tensors(tmp_path / "m", {"embeddings": embeddings}))
        embeddings[row, row] = 0
    assert len(found) == 1 + len(rows)


def test_the_same_values_under_other_names_are_another_model(tmp_path: Path) -> None:
    value = np.ones(10, np.int16)
    found = {write_tensors(tmp_path / "m", {"a": value, name: value}) for name in "bc"}
    assert len(found) == 2


def test_pieces_that_changed_places_are_another_model(tmp_path: Path) -> None:
    one, other = b"a" * PIECE_BYTES, b"b" * PIECE_BYTES
    assert model_identity(write(tmp_path / "x", one + other)) != model_identity(write(tmp_path / "y", other + one))


@pytest.mark.parametrize("weights", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_no_safetensors_has_an_identity_too(tmp_path: Path, weights: bytes) -> None:
    """A stray file of that name is no reason not to start: the loader says what is wrong with those it needs."""
    folders = [write(tmp_path / name, weights + name.encode() * 50) for name in "ab"]
    assert len({model_identity(folder) for folder in folders}) == 2


def test_a_folder_that_is_not_there_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing"):
        model_identity(tmp_path / "nothing")


class TestCache:
    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """The files of weights that were read."""
        read: list[Path] = []
        checksum = identity.checksum
        monkeypatch.setattr(identity, "checksum", lambda path: read.append(path) or checksum(path))
        return read

    @pytest.fixture
    def model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A model that has not changed for long, as far as anybody can tell."""
        made = write(tmp_path / "m", b"w" * 5000)
        now = time.time()
        monkeypatch.setattr("time.time", lambda: now + 2 * SETTLED_S)
        return made

    def test_weights_that_did_not_change_are_read_once(self, model: Path, read: list[Path]) -> None:
        assert len({model_identity(model) for _ in range(3)}) == 1
        assert len(read) == 1

    def test_weights_that_were_written_to_are_read_again_whatever_time_they_claim(
        self, model: Path, read: list[Path]
    ) -> None:
        path = model / "model.safetensors"
        before, status = model_identity(model), path.stat()
        time.sleep(0.02)  # more than a tick of the file system's clock
        with path.open("r+b") as file:
            file.write(b"x")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert model_identity(model) != before
        assert len(read) == 2

    def test_weights_that_have_just_changed_are_not_trusted(self, tmp_path: Path, read: list[Path]) -> None:
        model = write(tmp_path / "m", b"w" * 5000)
        assert model_identity(model) == model_identity(model)
        assert len(read) == 2

    def test_what_was_damaged_in_the_cache_is_not_used(self, model: Path, read: list[Path], cache: Path) -> None:
        before = model_identity(model)
        (kept,) = cache.iterdir()
        content = bytearray(kept.read_bytes())
        content[3] ^= 1
        kept.write_bytes(content)
        assert model_identity(model) == before
        kept.write_bytes(b"")
        assert model_identity(model) == before
        assert len(read) == 3

    def test_without_a_cache_a_model_has_an_identity_too(self, model: Path, cache: Path) -> None:
        before = model_identity(model)
        assert model_identity(model, cache=model / "config.json") == before
