"""Peak memory while a model is loaded in its own type, against the bytes of its weights.

    python -m benchmarks.load_memory --model s135m

Counts what loading adds to a process that has already imported everything, memory that it maps from files included.
"""

import argparse
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import models, processes


@dataclass(frozen=True, slots=True)
class Loading:
    """Bytes; memory as the difference to the process before it loaded."""

    weights: int
    """Size of the safetensors files."""
    peak: int
    final: int
    seconds: float

    @property
    def overhead(self) -> float:
        """Share of the weights' bytes that was needed on top of them."""
        return self.peak / self.weights - 1


def measure(model: Path) -> Loading:
    """Loads a model once, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_load, (model,))


def _load(model: Path) -> Loading:
    from engine.models.directory import load_spec
    from engine.models.loader import load_model

    load_spec(model)  # Imports what is imported late.
    processes.reset_peak_memory()
    before, _ = processes.memory()
    begin = time.perf_counter()
    decoder = load_model(model, "auto")
    seconds = time.perf_counter() - begin
    after, peak = processes.memory()
    del decoder  # Only now: it must be there while memory is read.
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return Loading(weights, peak - before, after - before, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="s135m", help=f"{', '.join(models.SHAPES)}, or a model directory")
    loading = measure(models.find(parser.parse_args().model))
    for name, count in (("weights", loading.weights), ("peak", loading.peak), ("afterwards", loading.final)):
        print(f"{name:12}{count / 2**20:10.1f} MiB")
    print(f"{'on top':12}{loading.overhead:10.1%}  in {loading.seconds:.2f} s")


if __name__ == "__main__":
    main()
