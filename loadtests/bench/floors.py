"""What the benchmark measures, the floors it must hold, and the arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from loadtests.bench.ways import (
    CASES,
    DIRECT,
    GATEWAY,
    NGINX,
)

STREAM_COST = "streams, chunks per CPU second"
STREAM_SHARE = "streams, share of nginx's"
STREAM_RATE = "streams, chunks per second"
STREAM_READS = "streams, chunks per read"
STREAM_WAKES = "streams, wake-ups per chunk"
JSON_COST = "JSON, requests per CPU second"
JSON_SHARE = "JSON, share of nginx's"
JSON_RATE = "JSON, requests per second"
JSON_CONNECTIONS = "JSON, engine connections per request"
TTFT = "TTFT p50, ms"
ADDED_TTFT = "TTFT p50 added to direct, ms"
RSS_IDLE = "RSS idle, MB"
RSS_PEAK = "RSS peak in the streams, MB"
#: By case: from a client's disconnect until the engine's connection is closed.
HANG_UP = {case: f"hang-up {case}, ms" for case in CASES}
#: How tables and messages name a measure; the JSON file has the names above.
LABELS = {
    HANG_UP["queued"]: "disconnect while queued, ms",
    HANG_UP["before headers"]: "disconnect before headers, ms",
    HANG_UP["mid-stream"]: "disconnect mid-stream, ms",
    HANG_UP["non-stream"]: "disconnect, JSON request, ms",
}
MEASURES = (
    STREAM_COST, STREAM_SHARE, STREAM_RATE, STREAM_READS, STREAM_WAKES, JSON_COST, JSON_SHARE,
    JSON_RATE, JSON_CONNECTIONS, TTFT, ADDED_TTFT, RSS_IDLE, RSS_PEAK, *HANG_UP.values(),
)  # fmt: skip


@dataclass(frozen=True)
class Floor:
    """A limit that the gateway's median must hold for a release, and the goal beyond it."""

    measure: str
    limit: float
    goal: float
    at_least: bool = False

    def holds(self, value: float) -> bool:
        """Whether a median holds the limit; the limit itself does."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


#: A release must hold every floor; the goals are where the project wants to be.
FLOORS = (
    Floor(STREAM_SHARE, 0.25, goal=0.4, at_least=True),
    Floor(JSON_SHARE, 0.045, goal=0.13, at_least=True),
    Floor(ADDED_TTFT, 1.5, goal=1.5),
    Floor(RSS_PEAK, 100, goal=80),
    *(Floor(HANG_UP[case], 50, goal=50) for case in CASES),
)
#: A value per round, by measure and way.
Measures: TypeAlias = dict[str, dict[str, list[float]]]
#: The measures, and notes on how they came about.
Measured: TypeAlias = tuple[Measures, list[str]]


@dataclass(frozen=True)
class RoundsSpread:
    """The lowest, median and highest value of all rounds."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> RoundsSpread:
        """The spread of at least one value."""
        return cls(min(values), statistics.median(values), max(values))


@dataclass(frozen=True)
class Verdict:
    """A floor beside the measured median; None if not measured, which is not a pass."""

    floor: Floor
    median: float | None

    @property
    def missed(self) -> bool:
        return self.median is not None and not self.floor.holds(self.median)

    def __str__(self) -> str:
        label = LABELS.get(self.floor.measure, self.floor.measure)
        if self.median is None:
            return f"{label}: not measured"
        return f"{label}: {self.median:.3g}, the floor is {self.floor}"


def add_ratios(measures: Measures) -> None:
    """Add the ratios and differences of ways, each computed within its round."""

    def per_round(
        measure: str, way: str, base: str, form: Callable[[float, float], float]
    ) -> list[float]:
        values = measures.get(measure, {})
        pairs = zip(values.get(way, ()), values.get(base, ()), strict=False)
        return [form(value, against) for value, against in pairs]

    for share, cost in ((STREAM_SHARE, STREAM_COST), (JSON_SHARE, JSON_COST)):
        if values := per_round(cost, GATEWAY, NGINX, lambda ours, theirs: ours / theirs):
            measures[share] = {GATEWAY: values}
    for way in (NGINX, GATEWAY):
        if values := per_round(TTFT, way, DIRECT, lambda proxied, direct: proxied - direct):
            measures.setdefault(ADDED_TTFT, {})[way] = values


def verdicts_of(measures: Measures) -> list[Verdict]:
    """The verdict of every floor, by the median of the rounds."""
    verdicts = []
    for floor in FLOORS:
        values = measures.get(floor.measure, {}).get(GATEWAY)
        verdicts.append(Verdict(floor, RoundsSpread.of(values).median if values else None))
    return verdicts
