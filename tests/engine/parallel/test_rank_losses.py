"""Ranks that share a model when one of them cannot load, dies, or is behind the others."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from engine.config import EngineConfig, KVConfig
from engine.errors import ModelError, RanksLost
from tests.compiled import compiled_library
from tests.engine.models.harness import Driver, random_tokens
from tests.engine.parallel.pool import Cut, Pool, Ranks
from tests.engine.parallel.test_rank import config_of


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compiled_library()


def test_a_rank_that_cannot_load_says_why(
    model_of: Callable[[str], Path], tmp_path: Path, load: Callable[[EngineConfig, Cut], Ranks], pool: Pool
) -> None:
    with pytest.raises(ValueError, match="4 heads cannot be divided among 3 ranks"):
        load(config_of(model_of("llama")), Cut(3))
    with pytest.raises(ValueError, match="the model has no experts"):
        load(config_of(model_of("llama")), Cut(2, 1, 2))
    config = config_of(model_of("llama"), kv=KVConfig(memory=100))
    with pytest.raises(ValueError, match="less than one page of 16 tokens"):
        load(config, Cut(1, 2))
    with pytest.raises((ModelError, RanksLost)):
        pool.processes[0].send("load", config_of(tmp_path), Cut().places(1)[0], "tcp://127.0.0.1:1")
        pool.processes[0].answer()


def test_a_rank_that_dies_is_an_error_for_its_neighbour_in_bounded_time(model_of: Callable[[str], Path]) -> None:
    """In shared memory nobody closes a connection: the wait itself is bounded."""
    pool = Pool()
    try:
        pool.take(2)
        for process in pool.processes:
            process.send("call", wait_at_most, 1.0)
            process.answer()
        ranks = pool.load(config_of(model_of("llama")), Cut(2))
        engine = ranks.engine(32)
        neighbour = pool.processes[1].process
        neighbour.kill()
        neighbour.join(10)
        driver = Driver(model_of("llama"), "torch")
        batch = driver.batch([(driver.start(random_tokens(9)), 9)])
        began = time.monotonic()
        pool.processes[0].send("run", batch)
        with pytest.raises(RanksLost, match="one of 2 ranks that share a stage did not come within 1 s"):
            pool.processes[0].answer()
        assert time.monotonic() - began < 10
        engine.close()
    finally:
        pool.close()


def wait_at_most(seconds: float) -> None:
    """In a rank's process: how long it waits for others from now on."""
    from engine.parallel import meeting

    meeting.Meeting.__init__.__defaults__ = (timedelta(seconds=seconds),)


def test_a_stage_goes_on_while_the_next_one_is_behind(
    model_of: Callable[[str], Path], load: Callable[[EngineConfig, Cut], Ranks]
) -> None:
    """It is asked for three batches before the next stage has seen any; what it sends waits, and keeps its order."""
    path = model_of("neox")
    driver = Driver(path, "C")
    streams = [driver.start(random_tokens(7 + 6 * index, seed=index)) for index in range(3)]
    batches = [driver.batch([(stream, len(stream.tokens))]) for stream in streams]
    expected = [driver.runner.run(batch).token_ids for batch in batches]
    ranks = load(config_of(path), Cut(1, 2))
    ranks.start(160)
    first, second = ranks.processes
    for process in (first, second):
        for batch in batches:
            process.send("run", batch)
        if process is first:
            assert [process.answer() for _ in batches] == [None] * 3
    assert [second.answer().token_ids for _ in batches] == expected
    ranks.close()


def test_a_stage_tells_for_how_long_it_waited_for_the_one_before(
    model_of: Callable[[str], Path], load: Callable[[EngineConfig, Cut], Ranks]
) -> None:
    path = model_of("neox")
    driver = Driver(path, "C")
    batch = driver.batch([(driver.start(random_tokens(7)), 7)])
    ranks = load(config_of(path), Cut(1, 2))
    ranks.start(160)
    first, second = ranks.processes
    second.send("run", batch)
    time.sleep(0.5)
    first.send("run", batch)
    first.answer(), second.answer()
    for process in ranks.processes:
        process.send("waited")
    assert first.answer() == 0.0
    assert 0.4 < second.answer() < 10.0
    ranks.close()
