"""Threads that compute alone: all the work is done, errors arrive, and the process's own number of threads stays."""

import threading

import pytest
import torch

from engine.quant.workers import Workers


def test_every_item_is_worked_on_by_a_thread_with_one_core() -> None:
    before = torch.get_num_threads()
    seen: dict[int, tuple[int, int]] = {}
    with Workers() as workers:
        workers.run(lambda item: seen.update({item: (threading.get_ident(), torch.get_num_threads())}), range(50))
    assert seen.keys() == set(range(50))
    assert {threads for _, threads in seen.values()} == {1}
    assert threading.get_ident() not in {thread for thread, _ in seen.values()}
    assert torch.get_num_threads() == before


def test_what_the_work_raises_arrives() -> None:
    def fail(item: int) -> None:
        raise ValueError(f"item {item}")

    with Workers() as workers, pytest.raises(ValueError, match="item 0"):
        workers.run(fail, range(3))
