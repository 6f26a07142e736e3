"""What a start begins before torch is imported."""

from pathlib import Path
from typing import Literal

import pytest

from engine import ahead, devices
from engine.ahead import begin_compiling
from engine.build import build_engine
from engine.config import EngineConfig, KVConfig, Quantization
from engine.errors import ModelError
from engine.kernels.cpu.compiler import CompileError
from engine.kernels.cpu.features import Feature


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[frozenset[Feature]]:
    """The features of each library that was asked for."""
    wanted: list[frozenset[Feature]] = []
    monkeypatch.setattr(ahead, "compile_ahead", wanted.append)
    return wanted


@pytest.mark.parametrize("quantization", ["auto", "w8a8", "w4a16"])
def test_it_is_the_library_that_the_engine_loads(
    quantization: Quantization, compiled: list[frozenset[Feature]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[frozenset[Feature]] = []
    monkeypatch.setattr(devices, "load_library", loaded.append)
    config = EngineConfig(
        device="cpu", threads=1, quantization=quantization, max_model_len=64, kv=KVConfig(memory=2**24)
    )
    thread = begin_compiling(config)
    assert thread is not None
    thread.join()
    build_engine(config)
    assert compiled == loaded


@pytest.mark.parametrize(
    ("device", "has_driver", "is_begun"),
    [
        ("cpu", True, True),
        ("auto", True, False),
        ("auto", False, True),
        ("cuda", False, False),
    ],
)
def test_it_is_for_a_cpu(
    device: Literal["cpu", "auto", "cuda"],
    has_driver: bool,
    is_begun: bool,
    compiled: list[frozenset[Feature]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    driver = tmp_path / "nvidiactl"
    if has_driver:
        driver.touch()
    monkeypatch.setattr(ahead, "_GPUS", (str(driver),))
    thread = begin_compiling(EngineConfig(device=device))
    assert (thread is not None) == is_begun
    if thread is not None:
        thread.join()
    assert len(compiled) == is_begun


def test_a_compiler_that_fails_fails_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(features: frozenset[Feature]) -> None:
        raise CompileError("no C compiler")

    monkeypatch.setattr(ahead, "compile_ahead", fail)
    raised: list[object] = []
    monkeypatch.setattr("threading.excepthook", raised.append)
    thread = begin_compiling(EngineConfig(device="cpu"))
    assert thread is not None
    thread.join()
    assert not raised


def test_a_model_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(ModelError, match="/no/model"):
        begin_compiling(EngineConfig(model="/no/model", device="cpu"))
