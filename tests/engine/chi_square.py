"""Pearson's chi-square test, for tests of sampled frequencies. Seeds are fixed by the callers, so verdicts are too."""

import math

import numpy as np
from numpy.typing import NDArray


def assert_frequencies(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> None:
    """Fails when `counts` would come from `probabilities` less than once in ten thousand times."""
    expected = probabilities * counts.sum()
    impossible = probabilities == 0
    assert not counts[impossible].any(), f"drawn with probability 0: {np.flatnonzero(impossible & (counts > 0))}"
    # The statistic is chi-square distributed only where five or more are expected: the rare ones count as one.
    rare = ~impossible & (expected < 5)
    observed = np.append(counts[~rare & ~impossible], counts[rare].sum())
    expected = np.append(expected[~rare & ~impossible], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    assert freedom > 0, "one possible outcome: nothing to test"
    statistic = float(((observed - expected) ** 2 / expected).sum())
    # Wilson and Hilferty's approximation of the 0.9999 quantile.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} with {freedom} degrees of freedom, limit {limit:.1f}"
