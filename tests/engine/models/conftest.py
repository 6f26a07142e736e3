"""A saved model, and copies of it to change."""

import shutil
from pathlib import Path

import pytest

from tests.engine.models.harness import CONFIGS, make_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_model(CONFIGS["llama"]).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A private copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))
