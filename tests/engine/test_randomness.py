"""The random numbers are the published generator's, uniform along every coordinate, and never change."""

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.randomness import philox4x32, uniforms
from tests.engine.chi_square import assert_frequencies

N = 20_000
PINNED = [0.3990464708489645, 0.6719982688953429, 0.26484590758014226, 0.15255766758396527, 0.15255766758396527]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(counter: str, key: str, words: str) -> None:
    lanes = philox4x32(_words(counter), _words(key))
    assert lanes.tolist() == _words(words).tolist()


def test_numbers_are_pinned() -> None:
    """A change here changes every seeded answer that clients have ever seen."""
    numbers = uniforms([0, 1, 42, -1, 2**64 - 1], [0, 0, 3, 1, 1], [0, 1, 17, 2**40, 2**40])
    assert numbers.tolist() == PINNED


def test_number_does_not_depend_on_its_neighbours() -> None:
    seeds, indices, positions = [5, 6, 7, 5], [0, 1, 0, 2], [10, 10, 11, 12]
    together = uniforms(seeds, indices, positions)
    alone = [uniforms([s], [i], [p])[0] for s, i, p in zip(seeds, indices, positions, strict=True)]
    assert together.tolist() == alone


def test_no_rows_give_no_numbers() -> None:
    assert uniforms([], [], []).shape == (0,)


def _along(coordinate: str) -> NDArray[np.float64]:
    """N numbers whose one coordinate counts up, as positions of a sequence, samples of a request or seeds do."""
    fixed = {"seeds": [1234] * N, "sample_indices": [0] * N, "positions": [7] * N}
    return uniforms(**(fixed | {coordinate: list(range(N))}))


@pytest.mark.parametrize("coordinate", ["positions", "seeds", "sample_indices"])
class TestAlongOneCoordinate:
    def test_uniform(self, coordinate: str) -> None:
        numbers = _along(coordinate)
        assert numbers.min() >= 0.0
        assert numbers.max() < 1.0
        assert_frequencies(np.bincount((numbers * 64).astype(int), minlength=64), np.full(64, 1 / 64))

    def test_low_bits_uniform(self, coordinate: str) -> None:
        low = (_along(coordinate) * 2**53).astype(np.int64) & 63
        assert_frequencies(np.bincount(low, minlength=64), np.full(64, 1 / 64))

    def test_neighbours_are_independent(self, coordinate: str) -> None:
        numbers = _along(coordinate)
        cells = (numbers * 8).astype(int)
        for lag in (1, 2, 64):
            pairs = cells[:-lag] * 8 + cells[lag:]
            assert_frequencies(np.bincount(pairs, minlength=64), np.full(64, 1 / 64))
            correlation = np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]
            assert abs(correlation) < 4 / np.sqrt(N)


def test_coordinates_are_not_interchangeable() -> None:
    """Seed 3 at position 5 is not seed 5 at position 3, nor sample 3 of another seed: no stream repeats another."""
    grid = [(s, i, p) for s in range(12) for i in range(12) for p in range(12)]
    numbers = uniforms(*zip(*grid, strict=True))
    assert len(set(numbers.tolist())) == len(grid)


def _words(text: str) -> NDArray[np.uint64]:
    return np.array([[int(word, 16)] for word in text.split()], dtype=np.uint64)
