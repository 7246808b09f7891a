"""Counting values in ranges."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

from lightning_grpo.diagnosis.records import Histogram

_MOST_VALUES = 12
_NUM_RANGES = 20


def histogram(values: Sequence[float], ticks: Sequence[float] | None = None) -> Histogram:
    """Count how often values occur: each by itself if there are few, else in equal ranges.

    There are at most 21 ranges, with round ends.

    Args:
        values: finite, at least one.
        ticks: the only values that can occur, where that is known; each value counts for the
            nearest.

    Returns:
        The counts, in ascending order of the values.
    """
    if ticks is not None:
        nearest = Counter(min(ticks, key=lambda tick: abs(tick - value)) for value in values)
        return Histogram(list(ticks), list(ticks), [nearest[tick] for tick in ticks])
    single = Counter(values)
    if len(single) <= _MOST_VALUES:
        found = sorted(single)
        return Histogram(found, found, [single[value] for value in found])
    low, high = min(values), max(values)
    step = _round_step((high - low) / _NUM_RANGES)
    first = math.floor(low / step)
    num_ranges = math.floor(high / step) - first + 1
    edges = [(first + i) * step for i in range(num_ranges + 1)]
    counts = Counter(bisect_right(edges, value, lo=1, hi=num_ranges) - 1 for value in values)
    return Histogram(edges[:-1], edges[1:], [counts[i] for i in range(num_ranges)])


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
