"""What a gateway costs, against the lanes it stands before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from loadtests.analysis.rows import Row


class Cost(msgspec.Struct, frozen=True):
    """What a gateway costs at a level, against the better of the lanes it stands before.

    Attributes:
        lane: The one whose median E2E is lower.
        e2e_s: Median, through the gateway and on the lane; `ttft_s` alike.
        is_noise: There are repetitions of both whose E2E cannot be told apart.
    """

    gateway: str
    level: int
    lane: str
    e2e_s: tuple[float, float]
    ttft_s: tuple[float, float]
    is_noise: bool


def gateway_costs(table: Iterable[Row], gateway: str, before: Sequence[str]) -> list[Cost]:
    """At every level at which the gateway and one of its lanes were measured."""
    found = []
    by_key = {(row.target, row.level): row for row in table}
    for (target, level), row in by_key.items():
        lanes = [by_key[label, level] for label in before if (label, level) in by_key]
        there = [(lane.e2e.median, lane) for lane in lanes if lane.e2e and lane.ttft]
        if target != gateway or row.e2e is None or row.ttft is None or not there:
            continue
        best = min(there, key=lambda one: one[0])[1]
        assert best.e2e is not None  # noqa: S101 - for the type checker
        assert best.ttft is not None  # noqa: S101
        found.append(
            Cost(
                gateway,
                level,
                best.target,
                (row.e2e.median, best.e2e.median),
                (row.ttft.median, best.ttft.median),
                row.e2e.overlaps(best.e2e),
            )
        )
    return found
