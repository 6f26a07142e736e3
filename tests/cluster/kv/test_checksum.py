"""The checksum is the one that others mean by its name, whatever holds the bytes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.kv.checksum import crc32c


def test_it_is_castagnolis() -> None:
    # The check value of CRC-32C, and two of RFC 3720, B.4.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


@given(content=st.binary(max_size=100))
def test_it_does_not_depend_on_what_holds_the_bytes(content: bytes) -> None:
    array = np.frombuffer(b"x" + content, dtype=np.uint8).copy()
    holders = [bytearray(content), memoryview(content), memoryview(bytearray(content)), array[1:]]
    assert {crc32c(holder) for holder in holders} == {crc32c(content)}


@given(content=st.binary(min_size=1, max_size=100), data=st.data())
def test_a_flipped_bit_changes_it(content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(content)
    damaged[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert crc32c(damaged) != crc32c(content)
