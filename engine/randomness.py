"""The randomness of sampling: a pure function of (seed, sample index, position), whatever the history or the batch.

Holds no state and knows neither logits nor requests.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, section 3.3) is counter-based: the
key is the seed, the counter is (position, sample index), and nearby counters give unrelated outputs by design.
"""

from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_KEY_STEPS = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None] * _WEYL


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10 over N lanes: counter [4, N] and key [2, N] of 32-bit words held in uint64 -> words [4, N]."""
    # The round function treats words (0, 2) and (1, 3) alike up to a swap, so each pair moves as one [2, N] array.
    even, odd = counter[0::2], counter[1::2]
    for round_key in (key + _KEY_STEPS) & _LOW:
        product = even * _MULTIPLIERS  # 32 x 32 bits: never overflows 64
        even = (product >> _WORD)[::-1] ^ odd ^ round_key
        odd = (product & _LOW)[::-1]
    return np.stack((even[0], odd[0], even[1], odd[1]))


def uniforms(
    seeds: SequenceOf[int], sample_indices: SequenceOf[int], positions: SequenceOf[int]
) -> NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits per (seed, sample index, position); the three are parallel, result [N].

    Seeds are taken modulo 2**64, so -1 and 2**64 - 1 are the same seed. Sample indices must be in [0, 2**32) and
    positions in [0, 2**64).
    """
    seed = np.array([s & 0xFFFFFFFFFFFFFFFF for s in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    sample_index = np.array(sample_indices, dtype=np.uint64)
    # The last counter word is the stream: 0 draws tokens; another use of the same key must take another number.
    counter = np.stack((position & _LOW, position >> _WORD, sample_index, np.zeros_like(position)))
    words = philox4x32(counter, np.stack((seed & _LOW, seed >> _WORD)))
    return ((words[0] << _WORD | words[1]) >> np.uint64(11)) * 2.0**-53
