"""A rank that notes when it has each batch, for `benchmarks.dispatch`, which tells it on standard input where to come.

Prints the times in nanoseconds, as JSON, after a batch with step 0. The monotonic clock is one for all processes of a
machine, in whatever namespaces.
"""

import base64
import json
import os
import pickle
import sys
import time

from cluster.shards.channel import RankChannel
from cluster.shards.door import Door
from engine.batch import Batch, StepOutput, StepStats


def order(door: Door, *, answers: bool) -> str:
    """What a rank is told, in one line."""
    return base64.b64encode(pickle.dumps((door, answers))).decode() + "\n"


def main() -> None:
    door, answers = pickle.loads(base64.b64decode(sys.stdin.readline()))
    channel = RankChannel(door, lambda: os._exit(1))
    receipts = []
    while True:
        batch = channel.receive()
        now = time.monotonic_ns()
        if not isinstance(batch, Batch) or batch.step == 0:
            break
        receipts.append(now)
        if answers:
            drawn = batch.num_sequences
            stats = StepStats(batch.num_tokens, drawn, 0.0)
            channel.send(StepOutput(batch.step, [0] * drawn, [None] * drawn, [], stats))
    print(json.dumps(receipts), flush=True)
    channel.close()


if __name__ == "__main__":
    main()
