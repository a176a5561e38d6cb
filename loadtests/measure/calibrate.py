"""Measures where two lanes cross: coarsely first, then closer, then again for the spread.

The gateway decides by the seconds of a request on each lane at each concurrency, and the
crossover matters most. So levels are added there until two of them are adjacent (from 16 on:
within an eighth), and the levels around it are repeated as long as time is left.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from loadtests.analysis import crossover, rows
from loadtests.measure import samples
from loadtests.measure.experiment import RAW
from loadtests.measure.itinerary import Visit
from loadtests.measure.matrix import Session

#: Repetitions of the levels around the crossover; a spread needs three.
CALIBRATION_REPETITIONS = 3
#: Levels on each side of the crossover that are measured again.
LEVELS_EACH_SIDE = 2


def bracket(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[int, int] | None:
    """The first two neighbouring levels between which the faster lane changes."""
    levels = sorted(a.keys() & b.keys())
    for low, high in pairwise(levels):
        if (a[low] - b[low]) * (a[high] - b[high]) < 0:
            return low, high
    return None


def next_level(a: Mapping[int, float], b: Mapping[int, float]) -> int | None:
    """The level to measure next, near the crossing; None if the bracket is narrow enough.

    It lies in the middle half of the bracket, so that noise at one end cannot hold it there.
    """
    levels = bracket(a, b)
    if levels is None:
        return None
    low, high = levels
    if high - low <= max(1, low // 8):
        return None
    quarter = (high - low) / 4
    wanted = round(min(high - quarter, max(low + quarter, crossing_level(a, b) or 0)))
    return min(high - 1, max(low + 1, wanted))


def crossing_level(a: Mapping[int, float], b: Mapping[int, float]) -> float | None:
    """The level at which the interpolated lines cross; None if the faster lane is the same."""
    levels = bracket(a, b)
    if levels is None:
        return None
    low, high = levels
    gap_low, gap_high = abs(a[low] - b[low]), abs(a[high] - b[high])
    return low + (high - low) * gap_low / (gap_low + gap_high)


def levels_around(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[int, ...]:
    """The levels on both sides of the crossover that decide it; all if there is none."""
    levels = sorted(a.keys() & b.keys())
    ends = bracket(a, b)
    if ends is None:
        return tuple(levels)
    below = [level for level in levels if level <= ends[0]]
    above = [level for level in levels if level >= ends[1]]
    return tuple(below[-LEVELS_EACH_SIDE:] + above[:LEVELS_EACH_SIDE])


def mean_seconds(cells: rows.Cells, label: str) -> dict[int, float]:
    """Mean seconds of a request by level; every repetition has the same weight."""
    return {
        level: sum(sum(one) / len(one) for one in by_repetition) / len(by_repetition)
        for level, by_repetition in crossover.seconds_by_level(cells, label).items()
    }


async def measure(session: Session, levels: Sequence[int], minutes: float) -> None:
    """Measure the session's one or two lanes into its raw file.

    After `minutes` nothing new is begun, but the first levels are measured in any case.

    Raises:
        VisitFailed: A lane does not serve.
    """
    deadline = time.monotonic() + 60 * minutes
    labels = list(session.entrants)
    raw = session.folder / RAW

    async def visit(levels: tuple[int, ...], repetition: int) -> None:
        for label in labels:
            await session.visit(Visit(label, repetition, levels))
        labels.reverse()  # the lane that serves now is measured first the next time

    await visit(tuple(levels), 1)
    while time.monotonic() < deadline:
        level = next_level(*measured_seconds(raw, labels)) if len(labels) > 1 else None
        if level is None:
            break
        await visit((level,), 1)
    for repetition in range(2, CALIBRATION_REPETITIONS + 1):
        if time.monotonic() < deadline:
            decisive = (
                levels_around(*measured_seconds(raw, labels)) if len(labels) > 1 else tuple(levels)
            )
            await visit(decisive, repetition)


def measured_seconds(raw: Path, labels: Sequence[str]) -> tuple[dict[int, float], dict[int, float]]:
    """Mean seconds by level of the first two lanes, from the raw file."""
    cells = rows.closed_cells(samples.read(raw))
    first, second = (mean_seconds(cells, label) for label in labels[:2])
    return first, second
