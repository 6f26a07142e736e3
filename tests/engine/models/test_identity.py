"""When two model directories are the same model."""

from pathlib import Path

import pytest

from engine.errors import ModelError
from engine.models.identity import SAMPLE_BYTES, SAMPLES, model_identity, sample_begins


def write(folder: Path, weights: bytes, config: str = "{}") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_the_same_files_elsewhere_are_the_same_model(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", b"w" * 5000), write(tmp_path / "b", b"w" * 5000)
    (b / "README.md").write_text("which is no part of it")
    assert model_identity(a) == model_identity(b)


def test_other_weights_other_settings_and_other_lengths_are_other_models(tmp_path: Path) -> None:
    large = bytes(3 * SAMPLES * SAMPLE_BYTES)
    trained = bytearray(large)
    trained[:: SAMPLE_BYTES // 2] = b"x" * len(trained[:: SAMPLE_BYTES // 2])
    models = [
        write(tmp_path / "a", b"w" * 5000),
        write(tmp_path / "b", b"w" * 4999 + b"x"),
        write(tmp_path / "c", b"w" * 5000, config='{"a": 1}'),
        write(tmp_path / "d", b"w" * 5001),
        write(tmp_path / "e", large),
        write(tmp_path / "f", bytes(trained)),
    ]
    assert len({model_identity(folder) for folder in models}) == len(models)


def test_a_file_is_sampled_from_its_first_byte_to_its_last() -> None:
    for length in (0, 1, SAMPLE_BYTES, SAMPLES * SAMPLE_BYTES, SAMPLES * SAMPLE_BYTES + 1, 10**9):
        begins = sample_begins(length)
        assert len(begins) <= SAMPLES
        assert not length or (begins[0] == 0 and begins[-1] + SAMPLE_BYTES >= length)


def test_a_folder_that_is_not_there_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing"):
        model_identity(tmp_path / "nothing")
