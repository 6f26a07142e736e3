"""For tests that need the compiled kernels: without them, what is computed beside a token may change its last bits."""

import pytest

from engine.kernels.cpu.compiler import load_library


def need_kernels() -> None:
    """Skips the test where there is no C compiler."""
    if load_library() is None:
        pytest.skip("no C compiler, and only the compiled kernels give the same bits in any company")
