"""Threads of a team keep to cores of their own, wait for each other, and leave the thread that called them free."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, get_native_id
from typing import TypeVar

import pytest
import torch

from engine.kernels.cpu.library import Library
from engine.kernels.cpu.operators import CpuOperators
from engine.kernels.cpu.program import Immediate, Program, Recorder, StepArrays
from engine.kernels.cpu.threads import bind_threads
from engine.machine import CoreShare

T = TypeVar("T")
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

linux = pytest.mark.skipif(len(CORES) < 2, reason="needs Linux and two cores")


def in_fresh_thread(work: Callable[[], T]) -> T:
    """The OpenMP runtime keeps threads for each thread that calls it: a new one starts without any."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def affinities() -> dict[int, set[int]]:
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # One that ends meanwhile.
            found[int(task.name)] = os.sched_getaffinity(int(task.name))
    return found


def run_something(library: Library, threads: int) -> torch.Tensor:
    x = torch.randn(64, 1000)
    y = torch.empty_like(x)
    Immediate(library, threads).emit("add", StepArrays(64), a=x, b=x, y=y, width=1000, dtype=0)
    assert torch.equal(y, x + x)
    return y


@linux
def test_each_worker_keeps_to_a_core_and_the_caller_stays_free(native_library: Library) -> None:
    def work() -> tuple[bool, set[int], list[set[int]]]:
        before = affinities()
        bound = bind_threads(native_library, len(CORES))
        run_something(native_library, len(CORES))
        workers = [cores for task, cores in affinities().items() if task not in before]
        return bound, os.sched_getaffinity(0), workers

    bound, caller, workers = in_fresh_thread(work)
    assert bound
    assert caller == set(CORES)
    assert sorted(workers, key=min) == [{core} for core in CORES[1:]]


@linux
def test_threads_are_not_bound_where_there_are_more_cores_than_threads(native_library: Library) -> None:
    def work() -> tuple[bool, list[set[int]]]:
        before = affinities()
        bound = bind_threads(native_library, len(CORES) + 1)
        run_something(native_library, 2)
        return bound, [cores for task, cores in affinities().items() if task not in before]

    bound, workers = in_fresh_thread(work)
    assert not bound
    assert workers == [set(CORES)]


@linux
@pytest.mark.parametrize("index", [0, 1])
def test_processes_that_share_the_cores_keep_to_their_own_part(native_library: Library, index: int) -> None:
    """A thread alone too, while a program runs; before and after it is free."""
    cores = CORES[:2]
    started, ended = Event(), Event()

    def work() -> tuple[bool, set[int]]:
        os.sched_setaffinity(0, cores)
        bound = bind_threads(native_library, 1, CoreShare(index, 2))
        task.append(get_native_id())
        started.set()
        while not ended.is_set():
            run_something(native_library, 1)
        return bound, os.sched_getaffinity(0)

    task: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        started.wait(10)
        deadline = time.monotonic() + 10
        while os.sched_getaffinity(task[0]) != {cores[index]} and time.monotonic() < deadline:
            pass
        is_seen = time.monotonic() < deadline
        ended.set()
        assert working.result(10) == (True, set(cores))
    assert is_seen


@linux
def test_a_core_that_cannot_be_used_leaves_threads_as_they_are(
    native_library: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {CORES[0], 1023})
    assert not bind_threads(native_library, 2)
    assert f"threads stay unbound: cores [{CORES[0]}, 1023]: Invalid argument" in caplog.text
    monkeypatch.undo()
    run_something(native_library, 2)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_an_operation_sees_all_that_the_one_before_it_wrote(native_library: Library, threads: int) -> None:
    """Norms divide the work by rows and sums by blocks, so that each thread reads what another one has written."""
    rows, width = 5, 3000

    def chain(threads: int) -> Program:
        recorder = Recorder(native_library, threads, capacity=rows)
        operators = CpuOperators(recorder)
        x = recorder.empty(rows, width, dtype=torch.float32)
        y, ones = x, torch.ones(width)
        for _ in range(100):
            y = operators.add(operators.rms_norm(y, ones, 1e-6)[0], x)
        return recorder.program(y, inputs=(x,))

    alone, together = chain(1), chain(threads)
    for taken in (5, 3, 1, 4, 5):
        x = torch.randn(taken, width)
        for program in (alone, together):
            program.inputs[0][:taken] = x
        assert torch.equal(together.run(StepArrays(taken)), alone.run(StepArrays(taken)))


def test_threads_that_call_at_the_same_time_do_not_meet(native_library: Library) -> None:
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(run_something, native_library, 2) for _ in range(40)]:
            future.result()
