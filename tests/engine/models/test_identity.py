"""When two model directories are the same model."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from engine.errors import ModelError
from engine.models.identity import LEAST_PIECES, PIECE_BYTES, STRIDE_BYTES, model_identity, pieces


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


def test_a_model_of_which_one_tensor_was_trained_is_another_model(tmp_path: Path) -> None:
    """As is one whose tensor is another part of a merged one."""
    tensors = {f"layers.{index}.qkv.weight": np.zeros((3, 30_000), np.int8) for index in range(40)}
    found = {write_tensors(tmp_path / "m", tensors)}
    for weight in tensors.values():
        for part in range(3):
            weight[part] = 1
            found.add(write_tensors(tmp_path / "m", tensors))
            weight[part] = 0
    assert len(found) == 1 + 3 * len(tensors)


def test_the_same_values_under_other_names_are_another_model(tmp_path: Path) -> None:
    value = np.ones(10, np.int16)
    found = {write_tensors(tmp_path / "m", {"a": value, name: value}) for name in "bc"}
    assert len(found) == 2


@pytest.mark.parametrize(
    "header", [b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{]", b'\x07\0\0\0\0\0\0\0{"a":1}']
)
def test_a_file_that_is_no_safetensors_has_an_identity_too(tmp_path: Path, header: bytes) -> None:
    """A stray file of that name is no reason not to start: the loader says what is wrong with those it needs."""
    folders = [write(tmp_path / name, header + name.encode() * 50) for name in "ab"]
    assert len({model_identity(folder) for folder in folders}) == 2


@pytest.mark.parametrize("offsets", ["[0]", '["a", "b"]', "[4, 2]", "[-9, 2]", "[0, 10000]", "7"])
def test_offsets_that_make_no_sense_are_not_followed(tmp_path: Path, offsets: str) -> None:
    header = f'{{"a": {{"data_offsets": {offsets}}}}}'.encode()
    model_identity(write(tmp_path / "a", len(header).to_bytes(8, "little") + header + b"w" * 50))


@given(begin=st.integers(0, 10**12), length=st.integers(0, 10**10))
def test_a_tensor_is_read_from_its_first_byte_to_its_last_and_nowhere_else(begin: int, length: int) -> None:
    end = begin + length
    spans = pieces(begin, end)
    assert spans[0][0] == begin and spans[-1][1] == end
    assert all(first[0] <= second[0] for first, second in pairwise(spans))
    gaps = [second[0] - first[1] for first, second in pairwise(spans)]
    assert max(gaps, default=0) <= max(2 * STRIDE_BYTES, length / (LEAST_PIECES - 1))
    assert sum(end - begin for begin, end in spans) <= LEAST_PIECES * PIECE_BYTES + length / STRIDE_BYTES * PIECE_BYTES


def test_a_folder_that_is_not_there_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing"):
        model_identity(tmp_path / "nothing")
