"""What a start begins before torch is imported."""

from pathlib import Path
from typing import Literal

import pytest

from engine import ahead
from engine.ahead import begin_compiling
from engine.config import EngineConfig, Quantization
from engine.errors import ModelError
from engine.kernels.cpu.compiler import CompileError


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each library that was asked for is to have products with weights of 4 bits."""
    wanted: list[bool] = []
    monkeypatch.setattr(ahead, "compile_ahead", lambda *, int4: wanted.append(int4))
    return wanted


@pytest.mark.parametrize(("quantization", "int4"), [("auto", False), ("w8a8", False), ("w4a16", True)])
def test_it_is_the_library_that_the_engine_will_load(
    quantization: Quantization, int4: bool, compiled: list[bool]
) -> None:
    thread = begin_compiling(EngineConfig(device="cpu", quantization=quantization))
    assert thread is not None
    thread.join()
    assert compiled == [int4]


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
    compiled: list[bool],
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
    def fail(*, int4: bool) -> None:
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
