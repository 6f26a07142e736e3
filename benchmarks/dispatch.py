"""What it takes to hand a batch to all ranks of a group: from submit to its receipt by ranks that compute nothing.

`python -m benchmarks.dispatch --ranks 2 8` starts so many processes on this machine, sends batches of decodes over the
group's own channel, and prints microseconds: until the first and until the last rank has the batch decoded, and until
the answer of the one that answers is back. A pause between batches lets all of them wait, as they do for a device.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path

import numpy as np

from benchmarks.machine import cpu_name
from cluster.shards.channel import GroupChannel, RankChannel
from cluster.shards.door import Door
from cluster.shards.wire import encode
from engine.batch import Batch, SampleRow, Samples, StepOutput, StepStats
from engine.machine import available_cores
from engine.sampling_params import SamplingParams

PAGE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Times:
    """Of one batch, in microseconds from its submission."""

    first: float
    last: float
    answer: float


def decodes(sequences: int, context: int, step: int) -> Batch:
    """An iteration of streams that have so many tokens each."""
    pages, params = -(-context // PAGE_TOKENS), SamplingParams()
    return Batch(
        step=step,
        sequence_ids=tuple(range(sequences)),
        token_ids=np.zeros(sequences, np.int64),
        positions=np.full(sequences, context - 1, np.int64),
        cu_seq_q=np.arange(sequences + 1, dtype=np.int32),
        context_lens=np.full(sequences, context, np.int32),
        page_table=np.arange(sequences * pages, dtype=np.int32).reshape(sequences, pages),
        samples=Samples.of([SampleRow(row, params, row, 0, context) for row in range(sequences)]),
    )


def run_rank(door: Door, receipts: "SynchronizedArray[int]", ranks: int, answers: bool) -> None:
    """A rank that notes when it has each batch. The monotonic clock is one for all processes of a machine."""
    channel = RankChannel(door, lambda: None)
    while True:
        batch = channel.receive()
        now = time.monotonic_ns()
        if not isinstance(batch, Batch) or batch.step == 0:
            break
        receipts[(batch.step - 1) * ranks + door.rank] = now
        if answers:
            drawn = batch.num_sequences
            stats = StepStats(batch.num_tokens, drawn, 0.0)
            channel.send(StepOutput(batch.step, [0] * drawn, [None] * drawn, [], stats))
    channel.close()


@contextmanager
def group(ranks: int, steps: int) -> Iterator[tuple[GroupChannel, "SynchronizedArray[int]"]]:
    """A channel to so many processes, which have all come."""
    spawn = multiprocessing.get_context("spawn")
    receipts = spawn.Array("q", ranks * steps)
    with tempfile.TemporaryDirectory() as folder:
        channel = GroupChannel([True] * ranks, ranks - 1, "127.0.0.1", Path(folder), lambda loss: None)
        processes = [
            spawn.Process(target=run_rank, args=(door, receipts, ranks, door.rank == ranks - 1), daemon=True)
            for door in channel.doors
        ]
        try:
            for process in processes:
                process.start()
            channel.arm()
            yield channel, receipts
            channel.send(decodes(1, 1, 0))
            for process in processes:
                process.join(10)
        finally:
            for process in processes:
                process.terminate()
            channel.close()


def measure(ranks: int, sequences: int, context: int, steps: int, pause_s: float) -> list[Times]:
    """The times of so many batches; those before, which warm the processes up, are left out."""
    warm = steps // 10
    sent, back = [], []
    with group(ranks, steps + warm) as (channel, receipts):
        for step in range(1, steps + warm + 1):
            batch = decodes(sequences, context, step)
            time.sleep(pause_s)
            sent.append(time.monotonic_ns())
            channel.send(batch)
            channel.receive()
            back.append(time.monotonic_ns())
            while not all(receipts[(step - 1) * ranks : step * ranks]):
                time.sleep(0.0005)
        seen = np.array(receipts[:], np.int64).reshape(-1, ranks)
    return [
        Times(*((value - start) / 1000 for value in (row.min(), row.max(), end)))
        for start, end, row in zip(sent[warm:], back[warm:], seen[warm:], strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dispatch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--context", type=int, default=2048, help="tokens of each sequence")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--pause", type=float, default=0.005, help="seconds between batches")
    arguments = parser.parse_args()
    size = len(encode(decodes(arguments.sequences, arguments.context, 1)))
    streams = f"{arguments.sequences} sequences of {arguments.context} tokens"
    print(f"{cpu_name()}, {available_cores()} cores; {streams}: {size} bytes")
    print(f"{'ranks':>5}  {'first rank':>18}  {'last rank':>18}  {'answer back':>18}   us, median and 99th percentile")
    for ranks in arguments.ranks:
        times = measure(ranks, arguments.sequences, arguments.context, arguments.steps, arguments.pause)
        columns = [[getattr(each, name) for each in times] for name in ("first", "last", "answer")]
        cells = [f"{np.median(column):8.0f} {np.percentile(column, 99):9.0f}" for column in columns]
        print(f"{ranks:>5}  {cells[0]:>18}  {cells[1]:>18}  {cells[2]:>18}")


if __name__ == "__main__":
    main()
