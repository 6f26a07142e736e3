"""Our own worker in the comparison with other engines."""

import pytest

from benchmarks.peers.workers.manta import Manta
from benchmarks.peers.workers.wire import Load
from engine.models.source import resolve_model


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    """Bytes of the built-in model's weights in each format, as reported."""
    model = str(resolve_model("manta-tiny"))

    def size(name: str) -> int:
        load = Load(model, name, threads=1, max_length=64, max_sequences=4, kv_bytes=4 * 2**20)
        return Manta(load).weight_bytes

    return {name: size(name) for name in ("bf16", "w8a8", "w4a8")}


def test_quantized_weights_are_reported_as_they_are_held(sizes: dict[str, int]) -> None:
    assert 0.5 < sizes["w8a8"] / sizes["bf16"] < 0.55
    # Every group of 64 has a scale of 32 bits and a zero point of 8, those of the head too.
    assert 0.28 < sizes["w4a8"] / sizes["bf16"] < 0.3
