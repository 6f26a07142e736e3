"""Nothing is compiled and nothing is loaded when a test begins, and there are kernels that compile at once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.kernels.cpu.compiler import load_library
from engine.kernels.cpu.library import argument_types

_WRAPPER = """#!/bin/sh
echo "$*" >> {log}
exec cc "$@"
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test starts with nothing compiled and nothing loaded."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Kernels that do nothing, and compile at once."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "kernels.c").write_text("".join(f"void {name}(void) {{}}\n" for name in argument_types()))
    (source / "program.c").write_text(
        'void run_program(void) {}\nconst char *instruction_set(void) { return "AVX2"; }\n'
    )
    return source


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with a line for each call of the compiler."""
    log, wrapper = tmp_path / "calls", tmp_path / "wrapper"
    wrapper.write_text(_WRAPPER.format(log=log))
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    return log
