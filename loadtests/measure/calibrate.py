"""Where two lanes cross: measured coarsely first, then closer and closer, then again.

What a gateway decides by is how long a request takes on each lane at each number at once,
and the point where the other lane becomes the faster one matters most. So levels are added
there until no whole number is left between two of them, and what lies around it is measured
again for as long as there is time: a point without a spread is no point.
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

#: Repetitions of what lies around the crossover; a spread needs three.
CALIBRATION_REPETITIONS = 3
#: Levels on each side of the crossover that are measured again.
LEVELS_EACH_SIDE = 2


def bracket(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[int, int] | None:
    """The first two levels, one after the other, between which the faster one changes."""
    levels = sorted(a.keys() & b.keys())
    for low, high in pairwise(levels):
        if (a[low] - b[low]) * (a[high] - b[high]) < 0:
            return low, high
    return None


def next_level(a: Mapping[int, float], b: Mapping[int, float]) -> int | None:
    """The level to measure next: near where the straight lines cross; None: near enough.

    SloBracket to the middle half, so that noise at one end cannot hold it there.
    """
    found = bracket(a, b)
    if found is None:
        return None
    low, high = found
    if high - low <= max(1, low // 8):
        return None
    quarter = (high - low) / 4
    wanted = round(min(high - quarter, max(low + quarter, crossing_level(a, b) or 0)))
    return min(high - 1, max(low + 1, wanted))


def crossing_level(a: Mapping[int, float], b: Mapping[int, float]) -> float | None:
    """Where the straight lines cross, if the faster one changes."""
    found = bracket(a, b)
    if found is None:
        return None
    low, high = found
    gap_low, gap_high = abs(a[low] - b[low]), abs(a[high] - b[high])
    return low + (high - low) * gap_low / (gap_low + gap_high)


def levels_around(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[int, ...]:
    """The levels that decide: on both sides of the crossover, or all where there is none."""
    levels = sorted(a.keys() & b.keys())
    found = bracket(a, b)
    if found is None:
        return tuple(levels)
    below = [level for level in levels if level <= found[0]]
    above = [level for level in levels if level >= found[1]]
    return tuple(below[-LEVELS_EACH_SIDE:] + above[:LEVELS_EACH_SIDE])


def mean_seconds(cells: rows.Cells, label: str) -> dict[int, float]:
    """Mean seconds a request, by level; every repetition counts the same."""
    return {
        level: sum(sum(one) / len(one) for one in by_repetition) / len(by_repetition)
        for level, by_repetition in crossover.seconds_by_level(cells, label).items()
    }


async def measure(session: Session, levels: Sequence[int], minutes: float) -> None:
    """Measure the session's one or two lanes; all of it is in the raw file afterwards.

    Nothing is begun after so many minutes, but the first levels are measured whatever it takes.

    Raises:
        VisitFailed: A lane does not serve.
    """
    deadline = time.monotonic() + 60 * minutes
    labels = list(session.entrants)
    raw = session.folder / RAW

    async def visit(levels: tuple[int, ...], repetition: int) -> None:
        for label in labels:
            await session.visit(Visit(label, repetition, levels))
        labels.reverse()  # who serves now is asked first the next time

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
    """Mean seconds by level of the first two, as the raw file has them."""
    cells = rows.closed_cells(samples.read(raw))
    first, second = (mean_seconds(cells, label) for label in labels[:2])
    return first, second
