"""Which levels are added until the crossover is narrow."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests import samples
from loadtests.calibrate import around, between, bracket, mean_seconds, times

COARSE = (1, 4, 16, 32)


def measured(of: Callable[[int], float], levels: tuple[int, ...] = COARSE) -> dict[int, float]:
    return {level: of(level) for level in levels}


def test_lanes_cross_between_the_levels_where_the_faster_one_changes() -> None:
    assert bracket(measured(float), measured(lambda n: 6 + n / 10)) == (4, 16)


def test_lanes_that_do_not_cross_need_no_more_levels() -> None:
    slow, fast = measured(lambda n: 2.0 * n), measured(float)

    assert bracket(slow, fast) is None
    assert between(slow, fast) is None
    assert around(slow, fast) == COARSE


@given(
    crossing=st.floats(1.01, 31.99),
    slope=st.floats(0.05, 0.9),
    bend=st.floats(0.5, 1.5),
)
def test_levels_are_added_until_the_crossover_is_between_neighbours(
    crossing: float, slope: float, bend: float
) -> None:
    def queue(n: int) -> float:
        return float(n**bend)

    def batch(n: int) -> float:
        return crossing**bend + slope * (n - crossing) * min(1.0, bend) * crossing ** (bend - 1)

    a, b = measured(queue), measured(batch)
    steps = 0
    while (level := between(a, b)) is not None:
        assert level not in a  # each is a new one
        a[level], b[level] = queue(level), batch(level)
        steps += 1

    assert steps <= 12
    found = bracket(a, b)
    if found is not None:
        low, high = found
        assert high - low <= max(1, low // 8)


def test_what_decides_lies_on_both_sides_of_the_crossover() -> None:
    levels = (1, 4, 8, 9, 16, 32)

    assert around(measured(float, levels), measured(lambda _: 8.5, levels)) == (4, 8, 9, 16)


def test_times_are_those_of_measured_requests_that_did_not_fail() -> None:
    def asked(repetition: int, e2e_s: float, **other: object) -> samples.Request:
        said: Mapping[str, object] = {"phase": "measured", **other}
        return samples.Request(
            "a",
            "closed",
            4,
            repetition,
            user=0,
            number=0,
            start=10.0,
            e2e_s=e2e_s,
            **said,  # type: ignore[arg-type]
        )

    lines: list[samples.Line] = [
        samples.Run(samples.VERSION, 0.0, []),
        asked(1, 1.0), asked(1, 3.0), asked(1, 99.0, error="500: no"),
        asked(1, 99.0, phase="warm-up"),
        samples.Cell("a", "closed", 4, 1, 9.0, 20.0),
        asked(2, 4.0),
        samples.Cell("a", "closed", 4, 2, 9.0, 20.0),
        asked(3, 99.0),
        samples.Cell("a", "closed", 4, 3, 9.0, 20.0, outcome="interrupted"),
    ]  # fmt: skip

    assert times(lines, "a") == {4: {1: [1.0, 3.0], 2: [4.0]}}
    assert mean_seconds(times(lines, "a"))[4] == pytest.approx(3.0)
