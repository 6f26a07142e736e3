"""Rank processes, shared by all tests that need some: each takes seconds to start."""

from collections.abc import Iterator

import pytest

from tests.engine.parallel.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()
