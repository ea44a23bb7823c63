"""Intervals around what was measured: of a proportion, of a difference of paired proportions, of paired means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 10_000


def wilson(correct: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson, 1927)."""
    p, z2 = correct / trials, z * z
    middle = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = z / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """The 95 % interval of p_first − p_second over the same trials (Newcombe, 1998, method 10)."""
    n = both + only_first + only_second + neither
    p1, p2 = (both + only_first) / n, (both + only_second) / n
    (l1, u1), (l2, u2) = wilson(both + only_first, n), wilson(both + only_second, n)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    phi = 0.0
    if margins:
        above: float = both * neither - only_first * only_second
        if above > 0:
            above = max(above - n / 2, 0.0)  # the method's continuity correction
        phi = above / math.sqrt(margins)
    d1, u = p1 - l1, u2 - p2
    e1, low = u1 - p1, p2 - l2
    difference = p1 - p2
    below = math.sqrt(max(d1 * d1 - 2 * phi * d1 * u + u * u, 0.0))
    over = math.sqrt(max(e1 * e1 - 2 * phi * e1 * low + low * low, 0.0))
    return difference - below, difference + over


def bootstrap_mean(values: np.ndarray, units: Sequence[int], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of values [N], whole units (documents) drawn with replacement.

    units: the unit of each value. Raises ValueError for fewer than two units, which have no spread.
    """
    names, index = np.unique(np.asarray(units), return_inverse=True)
    if len(names) < 2:
        raise ValueError("an interval needs at least two independent units")
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(len(names), size=(RESAMPLES, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
