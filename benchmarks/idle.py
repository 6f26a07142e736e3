"""What an application costs that nobody is using: CPU share of a process and all its descendants.

manta serve &
python -m benchmarks.idle $!
"""

import argparse
import time
from pathlib import Path

from benchmarks import processes


def cpu_shares(root: int, seconds: float) -> list[tuple[processes.ProcessTime, float]]:
    """Share of one core that each process of the tree used during `seconds`, the busiest first.

    A process that started meanwhile counts from its start; one that ended is not seen.
    """
    before = {entry.pid: entry.seconds for entry in processes.tree(root)}
    begin = time.monotonic()
    time.sleep(seconds)
    after = processes.tree(root)
    elapsed = time.monotonic() - begin
    shares = [(entry, (entry.seconds - before.get(entry.pid, 0.0)) / elapsed) for entry in after]
    return sorted(shares, key=lambda pair: -pair[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.idle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pid", type=int, help="process id of `manta serve`")
    parser.add_argument("--seconds", type=float, default=30.0)
    arguments = parser.parse_args()
    try:
        shares = cpu_shares(arguments.pid, arguments.seconds)
    except ProcessLookupError as error:
        raise SystemExit(str(error)) from None
    for entry, share in shares:
        if share > 0:
            print(f"{share:7.2%}  {entry.pid:8}  {describe(entry)}")
    print(f"{sum(share for _, share in shares):7.2%}  of one core, {len(shares)} processes, {arguments.seconds:.0f} s")


def describe(entry: processes.ProcessTime) -> str:
    """The command line, shortened: the names of Ray's processes do not tell them apart."""
    try:
        words = Path(f"/proc/{entry.pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        words = ""
    return words[:80] or entry.name


if __name__ == "__main__":
    main()
