"""Counting values in ranges."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

from lightning_grpo.diagnosis.records import Histogram

_MOST_VALUES = 12
_NUM_RANGES = 20


def histogram(values: Sequence[float], ticks: Sequence[float] | None = None) -> Histogram:
    """Count how often values occur: each by itself if there are few, else in 20 equal ranges.

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
    edges = [low + (high - low) * i / _NUM_RANGES for i in range(_NUM_RANGES)]
    counts = Counter(bisect_right(edges, value) - 1 for value in values)
    return Histogram(edges, [*edges[1:], high], [counts[i] for i in range(_NUM_RANGES)])
