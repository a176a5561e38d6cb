"""Which levels are added until the crossover is narrow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.analysis import rows
from loadtests.measure import samples
from loadtests.measure.calibrate import (
    bracket,
    crossing_level,
    levels_around,
    mean_seconds,
    next_level,
)
from loadtests.measure.samples import Request

COARSE = (1, 4, 16, 32)


def measured(of: Callable[[int], float], levels: tuple[int, ...] = COARSE) -> dict[int, float]:
    return {level: of(level) for level in levels}


def test_lanes_cross_between_the_levels_where_the_faster_lane_changes() -> None:
    assert bracket(measured(float), measured(lambda n: 6 + n / 10)) == (4, 16)


def test_lanes_that_do_not_cross_need_no_more_levels() -> None:
    slow, fast = measured(lambda n: 2.0 * n), measured(float)

    assert bracket(slow, fast) is None
    assert next_level(slow, fast) is None
    assert levels_around(slow, fast) == COARSE


@given(
    at=st.floats(1.01, 31.99),
    slope=st.floats(0.05, 0.9),
    bend=st.floats(0.5, 1.5),
)
def test_levels_are_added_until_the_crossover_is_between_neighbours(
    at: float, slope: float, bend: float
) -> None:
    def queue(n: int) -> float:
        return float(n**bend)

    def batch(n: int) -> float:
        return float(at**bend + slope * (n - at) * min(1.0, bend) * at ** (bend - 1))

    a, b = measured(queue), measured(batch)
    steps = 0
    while (level := next_level(a, b)) is not None:
        assert level not in a  # each is a new one
        a[level], b[level] = queue(level), batch(level)
        steps += 1

    assert steps <= 12
    found = bracket(a, b)
    if found is not None:
        low, high = found
        assert high - low <= max(1, low // 8)


def test_the_deciding_levels_lie_on_both_sides_of_the_crossover() -> None:
    levels = (1, 4, 8, 9, 16, 32)

    assert levels_around(measured(float, levels), measured(lambda _: 8.5, levels)) == (4, 8, 9, 16)


def test_repetitions_have_the_same_weight_and_failures_none() -> None:
    def asked(repetition: int, start: float, e2e_s: float, error: str | None = None) -> Request:
        return Request(
            "a", "closed", 4, repetition, user=0, number=0, phase="measured", start=start,
            e2e_s=e2e_s, error=error,
        )  # fmt: skip

    lines: list[samples.Line] = [
        samples.Run(samples.SAMPLES_VERSION, 0.0, []),
        asked(1, 10, 1.0), asked(1, 11, 3.0), asked(1, 12, 99.0, error="500: no"),
        samples.Cell("a", "closed", 4, 1, 9.0, 20.0),
        asked(2, 30, 4.0),
        samples.Cell("a", "closed", 4, 2, 29.0, 40.0),
        asked(3, 50, 99.0),
        samples.Cell("a", "closed", 4, 3, 49.0, 60.0, outcome="interrupted"),
    ]  # fmt: skip

    assert mean_seconds(rows.closed_cells(lines), "a") == {4: pytest.approx(3.0)}


def test_lanes_cross_on_the_straight_line_between_two_levels() -> None:
    assert crossing_level({1: 1.0, 5: 5.0}, {1: 2.0, 5: 2.0}) == pytest.approx(2.0)
    assert crossing_level({1: 1.0, 5: 5.0}, {1: 2.0, 5: 6.0}) is None
