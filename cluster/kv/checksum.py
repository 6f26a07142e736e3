"""CRC32C of a page: what tells a page that was damaged in memory, on disk or on the way. Knows nothing of pages."""

from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray


def crc32c(buffer: bytes | bytearray | memoryview | NDArray[Any]) -> int:
    """The CRC32C (Castagnoli) of contiguous bytes, which are not copied.

    About 25 GB/s in cache and 14 GB/s from memory with SSE 4.2. It holds the GIL all the while: 40 us for 1 MiB, so a
    caller with a loop to keep alive sums page by page.
    """
    # google-crc32c takes numpy's arrays, but not a memoryview that could be written to.
    flat = buffer if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, dtype=np.uint8)
    return int(google_crc32c.value(flat))
