"""Strikes one host after another under streams of a model that several share: what `tests.netns` runs inside a world.

Prints what came of it, as a table.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.chaos import undisturbed
from benchmarks.chaos_streams import PROMPT
from tests.netns.cluster import Cluster, ClusterFailed, until
from tests.netns.hosts import HostFailed
from tests.netns.trial import Report, Strike, run

LAYOUTS = {"pipeline": {"pipeline": 2}, "tensor": {"tensor": 2}}
STRIKES = {
    "rank-killed": Strike("killed", "rank"),
    "rank-cut": Strike("cut off", "rank"),
    "replica-killed": Strike("killed", "replica"),
    "replica-cut": Strike("cut off", "replica"),
}
MODEL = "model"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tests/netns/run.sh",
        description="Hosts are killed and cut off under the streams of one model that two of them share, while a third"
        " one stands by. Each is a network of its own on this machine; root, or user namespaces, are needed.",
    )
    made.add_argument("--layouts", type=_names(LAYOUTS), default=tuple(LAYOUTS), help=f"of {','.join(LAYOUTS)}")
    made.add_argument("--strikes", type=_names(STRIKES), default=tuple(STRIKES), help=f"of {','.join(STRIKES)}")
    made.add_argument("--gateways", type=int, default=2)
    made.add_argument("--max-tokens", type=int, default=300, help="of each answer")
    made.add_argument("--json", type=Path, metavar="FILE", help="for the numbers")
    made.add_argument("--logs", type=Path, metavar="FOLDER", help="for what all processes have said")
    return made


def _names(known: dict[str, Any]) -> Any:
    def read(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return read


def application(layout: dict[str, int], gateways: int) -> dict[str, Any]:
    """One replica of two ranks, small enough for a host that has little."""
    return {
        "served_model_name": MODEL,
        "cpus_per_replica": 2,
        "engine": {"model": "manta-tiny", "device": "cpu", "deterministic": True, "kv": {"memory": "64MiB"}},
        "parallel": layout,
        "gateway": {"replicas": gateways},
        "kv_host": {"memory": "64MiB"},
    }


def strike_all(cluster: Cluster, options: argparse.Namespace) -> list[Report]:
    reports = []
    for layout in options.layouts:
        began = time.monotonic()
        cluster.deploy(application(LAYOUTS[layout], options.gateways))
        until(cluster.answers, "nobody answers requests")
        print(f"{layout}: serving after {time.monotonic() - began:.1f} s", flush=True)
        calm = undisturbed(cluster.url, MODEL, PROMPT, 0, options.max_tokens)
        pairs = zip(calm.asked, calm.answers, strict=True)
        # An answer in one piece has no connection that a client could take for dead sooner than its own patience ends.
        streams = {kind.name: (kind, answer) for kind, answer in pairs if kind.body.get("stream")}
        asked, answers = zip(*streams.values(), strict=True)
        for name in options.strikes:
            if reports:
                cluster.restore()
            report = run(cluster, STRIKES[name], asked, answers, f"{layout} {name}")
            report.what = f"{layout}: {report.what}"
            for complaint in report.complaints:
                print(f"{report.what}: {complaint}", flush=True)
            print(f"{report.what}: over after {time.monotonic() - began:.1f} s", flush=True)
            reports.append(report)
    return reports


_COLUMNS = {
    "noticed": "noticed_s",
    "ended": "ended_s",
    "by Ray": "forgotten_s",
    "loaded": "loaded_s",
    "went on": "went_on_s",
    "orphans": "orphans_s",
}


def table(reports: Sequence[Report]) -> str:
    """What happened, and after how many seconds."""
    names = "".join(f"{name:>9}" for name in ("cut", "resumed", *_COLUMNS, "wrong"))
    return "\n".join([f"{'':42}{names}", *map(_line, reports)])


def _line(report: Report) -> str:
    moments = [getattr(report, field) for field in _COLUMNS.values()]
    shown = "".join(f"{'-' if moment is None else f'{moment:.1f}':>9}" for moment in moments)
    return f"{report.what:42}{report.cut:9}{report.resumed:9}{shown}{len(report.complaints):9}"


def main() -> None:
    options = parser().parse_args()
    cluster = Cluster()
    reports: list[Report] = []
    try:
        began = time.monotonic()
        cluster.start()
        print(f"{len(cluster.hosts)} hosts with Ray and Serve after {time.monotonic() - began:.1f} s", flush=True)
        reports = strike_all(cluster, options)
    except (ClusterFailed, HostFailed) as error:
        raise SystemExit(f"tests/netns: {error}") from None
    finally:
        if options.logs is not None:
            with contextlib.suppress(OSError):
                cluster.keep_logs(options.logs)
        print(table(reports), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1), encoding="utf-8")
    sys.stdout.flush()
    # Nothing is left to be waited for: all that runs on the hosts ends with this process.
    os._exit(int(any(report.complaints or not report.cut for report in reports)))


if __name__ == "__main__":
    main()
