"""What it takes to hand a batch to all ranks of a group: from submit to its receipt by ranks that compute nothing.

`python -m benchmarks.dispatch --ranks 2 8` starts so many processes on this machine, sends batches of decodes over the
group's own channel, and prints microseconds: until the first and until the last rank has the batch decoded, and until
the answer of the one that answers is back. A pause between batches lets all of them wait, as they do for a device.

With `--hosts 4` the ranks are dealt out to so many hosts, the group on the first of them: network namespaces on this
machine with a switch between them (`tests/netns`). All but the first host's ranks are reached by TCP, encrypted. All
processes share this machine's cores whatever the hosts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import dispatch_rank
from benchmarks.machine import cpu_name
from cluster.shards.channel import GroupChannel
from cluster.shards.wire import encode
from engine.batch import Batch, SampleRow, Samples
from engine.machine import available_cores
from engine.sampling_params import SamplingParams

PAGE_TOKENS = 16
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Times:
    """Of one batch, in microseconds from its submission."""

    first: float
    last: float
    answer: float


@dataclass(frozen=True, slots=True)
class Layout:
    """Where ranks run."""

    near: tuple[bool, ...]
    """By rank, whether it is on the group's own host."""
    address: str
    """Of that host, for the others."""
    inside: Callable[[int, list[str]], list[str]]
    """The command that runs one where a rank is."""


def one_host(ranks: int) -> Layout:
    return Layout((True,) * ranks, "127.0.0.1", lambda rank, command: command)


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


@contextmanager
def group(layout: Layout) -> Iterator[tuple[GroupChannel, "list[subprocess.Popen[str]]"]]:
    """A channel to ranks that have all come, the last of which answers."""
    answering = len(layout.near) - 1
    command = [sys.executable, "-m", dispatch_rank.__name__]
    processes: list[subprocess.Popen[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        channel = GroupChannel(layout.near, answering, layout.address, Path(folder), lambda loss: None)
        try:
            for door in channel.doors:
                process = subprocess.Popen(
                    layout.inside(door.rank, command),
                    cwd=_ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                processes.append(process)
                assert process.stdin is not None
                process.stdin.write(dispatch_rank.order(door, answers=door.rank == answering))
                process.stdin.flush()
            channel.arm()
            yield channel, processes
        finally:
            for process in processes:
                with process:
                    process.kill()
            channel.close()


def measure(layout: Layout, sequences: int, context: int, steps: int, pause_s: float) -> list[Times]:
    """The times of so many batches; those before, which warm the processes up, are left out."""
    warm = steps // 10
    sent, back = [], []
    with group(layout) as (channel, processes):
        for step in range(1, steps + warm + 1):
            time.sleep(pause_s)
            # As an engine does: what was awake to make a batch sends it.
            batch = decodes(sequences, context, step)
            sent.append(time.monotonic_ns())
            channel.send(batch)
            channel.receive()
            back.append(time.monotonic_ns())
        channel.send(decodes(1, 1, 0))
        seen = np.array([json.loads(next(iter(process.stdout or ()))) for process in processes], np.int64).T
    return [
        Times(*((value - start) / 1000 for value in (row.min(), row.max(), end)))
        for start, end, row in zip(sent[warm:], back[warm:], seen[warm:], strict=True)
    ]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.dispatch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--ranks", type=int, nargs="+", default=[2, 8])
    made.add_argument("--hosts", type=int, default=1, help="that the ranks are dealt out to (default: %(default)s)")
    made.add_argument("--sequences", type=int, default=32)
    made.add_argument("--context", type=int, default=2048, help="tokens of each sequence")
    made.add_argument("--steps", type=int, default=500)
    made.add_argument("--pause", type=float, default=0.005, help="seconds between batches")
    made.add_argument("--json", type=Path, metavar="FILE", help="for the medians")
    return made


def report(arguments: argparse.Namespace, layout_of: Callable[[int], Layout]) -> None:
    """Measures and prints, with the layout of each number of ranks."""
    size = len(encode(decodes(arguments.sequences, arguments.context, 1)))
    streams = f"{arguments.sequences} sequences of {arguments.context} tokens"
    print(f"{cpu_name()}, {available_cores()} cores; {streams}: {size} bytes; us, median and 99th percentile")
    print(f"{'hosts':>5}  {'ranks':>5}  {'first rank':>18}  {'last rank':>18}  {'answer back':>18}")
    medians = []
    for ranks in arguments.ranks:
        layout = layout_of(ranks)
        times = measure(layout, arguments.sequences, arguments.context, arguments.steps, arguments.pause)
        columns = {name: [getattr(each, name) for each in times] for name in Times.__slots__}
        cells = [f"{np.median(column):8.0f} {np.percentile(column, 99):9.0f}" for column in columns.values()]
        print(f"{arguments.hosts:>5}  {ranks:>5}  {cells[0]:>18}  {cells[1]:>18}  {cells[2]:>18}", flush=True)
        medians.append({"ranks": ranks, **{name: float(np.median(column)) for name, column in columns.items()}})
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(medians))


def over_hosts(arguments: Sequence[str]) -> int:
    """Runs this in a world of several hosts, which is the tests' to make; its exit code."""
    return subprocess.run([sys.executable, "-m", "tests.netns.dispatch", *arguments], cwd=_ROOT, check=False).returncode


def main() -> int:
    arguments = parser().parse_args()
    if not 1 <= arguments.hosts <= min(arguments.ranks):
        parser().error(f"--hosts {arguments.hosts}: each has a rank or more")
    if arguments.hosts > 1:
        return over_hosts(sys.argv[1:])
    report(arguments, one_host)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
