"""Percentiles, and values with the spread of their repetitions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import msgspec


def percentile(values: Sequence[float], p: float) -> float:
    """The value below which a share `p` of them lies; `values` need no order."""
    ordered = sorted(values)
    place = p * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Spread(msgspec.Struct, frozen=True):
    """A value, and the lowest and highest of the repetitions it is the median of."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one repetition."""
        return cls(statistics.median(values), min(values), max(values))


class Summary(msgspec.Struct, frozen=True):
    """What the requests of all repetitions took, seconds.

    Attributes:
        low: Median of the repetition whose median is lowest.
        high: The same, highest.
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
        """None where there is no value at all."""
        there = [values for values in by_repetition if values]
        if not there:
            return None
        every = [value for values in there for value in values]
        medians = [statistics.median(values) for values in there]
        p90, p95, p99 = (percentile(every, p) for p in (0.9, 0.95, 0.99))
        mean, median = statistics.fmean(every), statistics.median(every)
        return cls(len(every), mean, median, p90, p95, p99, min(medians), max(medians))

    def overlaps(self, other: Summary) -> bool:
        """Whether there are repetitions of both that cannot be told apart."""
        return self.low <= other.high and other.low <= self.high
