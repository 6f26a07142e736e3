"""The compiled kernels, for tests that have no other subject, or need the same bits in any company: what is computed
beside a token may change its last bits without them."""

import pytest

from engine.kernels.cpu.compiler import load_library
from engine.kernels.cpu.library import Library


def compiled_library() -> Library:
    """Skips the test where there is no C compiler."""
    library = load_library()
    if library is None:
        pytest.skip("no C compiler")
    return library
