"""The compiled kernels, for every instruction set that this machine can run."""

import os
import platform
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest

from engine.kernels.cpu.compiler import CompileError, compile_library
from engine.kernels.cpu.library import Library

_V3 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_NEEDS = {"native": set(), "x86-64-v4": _V4, "x86-64-v3": _V3, "x86-64": set()}


def _cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _compiled(march: str) -> Library:
    if march != "native" and (platform.machine() != "x86_64" or not _NEEDS[march] <= _cpu_flags()):
        pytest.skip(f"this CPU does not run {march}")
    try:
        return compile_library(march)
    except CompileError as error:
        if not _compiler_works():
            pytest.skip(f"no C compiler that works: {error}")
        raise


@cache
def _compiler_works() -> bool:
    """Whether an empty file can be compiled: if it can, kernels that cannot are at fault."""
    command = [*shlex.split(os.environ.get("CC", "cc")), "-x", "c", "-c", os.devnull, "-o", os.devnull]
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="session", params=list(_NEEDS))
def library(request: pytest.FixtureRequest) -> Library:
    """The kernels of one instruction set after the other."""
    return _compiled(request.param)


@pytest.fixture(scope="session")
def native_library() -> Library:
    """The kernels as they run in earnest, for what does not depend on the instruction set."""
    return _compiled("native")
