"""Percentiles, and values with the spread of their repetitions.

Percentiles are linear between the two nearest values: of n sorted values, p lies at place
p * (n - 1), counted from 0 (definition 7 of Hyndman and Fan, numpy's default).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import msgspec


def percentile(values: Sequence[float], p: float) -> float:
    """The value below which the share `p` (0 to 1) of `values` lies; they need no order."""
    ordered = sorted(values)
    place = p * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Spread(msgspec.Struct, frozen=True):
    """The median of several repetitions, with the lowest and the highest of them."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


class Summary(msgspec.Struct, frozen=True):
    """A latency over the requests of all repetitions, seconds.

    Attributes:
        low: The lowest median of a repetition.
        high: The highest median of a repetition.
    """

    count: int
    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    low: float
    high: float

    @classmethod
    def of(cls, by_repetition: Iterable[Sequence[float]]) -> Summary | None:
        """The summary of all values; None if there is none."""
        repetitions = [values for values in by_repetition if values]
        if not repetitions:
            return None
        every = [value for values in repetitions for value in values]
        medians = [statistics.median(values) for values in repetitions]
        p90, p95, p99 = (percentile(every, p) for p in (0.9, 0.95, 0.99))
        mean, median = statistics.fmean(every), statistics.median(every)
        return cls(len(every), mean, median, p90, p95, p99, min(medians), max(medians))

    def overlaps(self, other: Summary) -> bool:
        """Whether the medians of the repetitions overlap: the difference is not significant."""
        return self.low <= other.high and other.low <= self.high
