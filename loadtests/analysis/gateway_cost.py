"""The latency that a gateway adds to the lanes behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from loadtests.analysis.rows import Row


class GatewayCost(msgspec.Struct, frozen=True):
    """Latency through a gateway at a level, beside the fastest lane behind it.

    Attributes:
        lane: The lane with the lowest median E2E.
        e2e_s: Median E2E through the gateway and on the lane, seconds.
        ttft_s: Median TTFT through the gateway and on the lane, seconds.
        is_noise: The difference is not significant: the repetitions' E2E medians overlap.
    """

    gateway: str
    level: int
    lane: str
    e2e_s: tuple[float, float]
    ttft_s: tuple[float, float]
    is_noise: bool


def gateway_costs(table: Iterable[Row], gateway: str, before: Sequence[str]) -> list[GatewayCost]:
    """One cost a level at which the gateway and one of its lanes were measured."""
    costs = []
    by_key = {(row.target, row.level): row for row in table}
    for (target, level), row in by_key.items():
        lanes = [by_key[label, level] for label in before if (label, level) in by_key]
        by_e2e = [(lane.e2e.median, lane) for lane in lanes if lane.e2e and lane.ttft]
        if target != gateway or row.e2e is None or row.ttft is None or not by_e2e:
            continue
        best = min(by_e2e, key=lambda pair: pair[0])[1]
        assert best.e2e is not None  # noqa: S101 - for the type checker
        assert best.ttft is not None  # noqa: S101
        costs.append(
            GatewayCost(
                gateway,
                level,
                best.target,
                (row.e2e.median, best.e2e.median),
                (row.ttft.median, best.ttft.median),
                row.e2e.overlaps(best.e2e),
            )
        )
    return costs
