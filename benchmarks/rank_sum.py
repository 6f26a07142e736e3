"""What a sum over two ranks of one host costs, in shared memory and over connections.

A layer has two of them. Both ranks are processes with one thread; medians are of rank 0, alternating between the ways.

    python -m benchmarks.rank_sum
"""

import argparse
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch

from engine.kernels.cpu.compiler import compile_library
from engine.kernels.cpu.program import Recorder, StepArrays
from engine.parallel.group import TensorGroup
from engine.parallel.meeting import Meeting
from engine.parallel.place import Place
from engine.parallel.slices import TensorRank

RANKS = 2
SHAPES = ((16, 2048), (1024, 2048))
DTYPE = torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rank_sum", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200, help="sums of each kind")
    arguments = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as server:
        rendezvous = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=run_rank, args=(rank, rendezvous, arguments.rounds), daemon=True)
        for rank in range(1, RANKS)
    ]
    for process in others:
        process.start()
    medians = run_rank(0, rendezvous, arguments.rounds)
    for process in others:
        process.join()
    print(f"sum over {RANKS} ranks, bfloat16, microseconds: median of {arguments.rounds}")
    for shape, ways in medians.items():
        shared, connected = ways["shared memory"], ways["gloo"]
        print(
            f"{shape!s:>14}  shared memory {1e6 * shared:8.1f}   gloo {1e6 * connected:8.1f}   "
            f"{connected / shared:5.1f}x"
        )


def run_rank(rank: int, rendezvous: str, rounds: int) -> dict[tuple[int, int], dict[str, float]]:
    """Takes part in all sums; returns the median seconds of each kind."""
    torch.set_num_threads(1)
    meeting = Meeting(Place(0, 1, range(1), TensorRank(rank, RANKS)), rendezvous, timedelta(seconds=60))
    group = TensorGroup(meeting, meeting.connect("ranks", rank, RANKS, torch.device("cpu")))
    largest = max(rows * width * DTYPE.itemsize for rows, width in SHAPES)
    recorder = Recorder(compile_library(features=frozenset({"ranks"})), 1, max(rows for rows, _ in SHAPES))
    ranks = group.in_program(recorder.library, 1, largest)
    if not group.is_shared:
        raise SystemExit("the ranks have no memory that they share: is there room in /dev/shm?")
    medians = {}
    for rows, width in SHAPES:
        x = recorder.empty(recorder.capacity, width, dtype=DTYPE)
        program = recorder.program(ranks.sum(recorder, x), inputs=(x,))
        program.inputs[0].fill_(rank + 1)
        step, other = StepArrays(rows), torch.full((rows, width), rank + 1.0, dtype=DTYPE)
        assert program.run(step).eq(RANKS * (RANKS + 1) / 2).all() and group.sum(other).eq(3).all()
        other.zero_()
        ways: dict[str, Callable[[], object]] = {
            "shared memory": partial(program.run, step),
            "gloo": partial(group.sum, other),
        }
        medians[rows, width] = measure(ways, rounds)
    meeting.wait_for_all("measured", meeting.timeout)
    return medians


def measure(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in seconds.items()}


if __name__ == "__main__":
    main()
