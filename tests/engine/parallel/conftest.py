"""Rank processes, shared by all tests that need some, as each takes seconds to start; and models to cut."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.config import EngineConfig
from tests.engine.models.harness import CONFIGS, make_model
from tests.engine.parallel.pool import Cut, Pool, Ranks


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def load(pool: Pool) -> Callable[[EngineConfig, Cut], Ranks]:
    return pool.load


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where the small model of a configuration of the harness lies."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_model(CONFIGS[name]).save_pretrained(made[name])
        return made[name]

    return get
