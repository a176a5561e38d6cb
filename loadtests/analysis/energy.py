"""Watts, and what tokens cost of them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence

import msgspec

from loadtests.analysis.rows import Repetition, Row
from loadtests.analysis.spread import Spread
from loadtests.measure.experiment import Cost as Prices
from loadtests.measure.samples import Power

#: Between two looks at the cards more than this, and nobody knows what they drew, seconds.
LONGEST_GAP_S = 5.0


class Energy(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a target drew at a level, and what tokens cost of it; None: not known.

    Attributes:
        watts: As given, or of the cards, mean over the window.
        electricity: For a million output tokens.
        rent: For the hours that a million output tokens take.
    """

    target: str
    level: int
    watts: Spread | None = None
    tokens_per_joule: Spread | None = None
    electricity: Spread | None = None
    rent: Spread | None = None


def energy_by_row(table: Iterable[Row], powers: Sequence[Power], prices: Prices) -> list[Energy]:
    """What is known of that, of every target at every level; nothing of whom nothing is."""
    found = [_energy(row, powers, prices) for row in table]
    return [one for one in found if one.watts or one.rent]


def _energy(row: Row, powers: Sequence[Power], prices: Prices) -> Energy:
    every = [(prices.watts or mean_watts(one, powers), one) for one in row.repetitions]
    known = [(watts, one.tokens_per_s) for watts, one in every if watts]
    efficiency = [tokens / watts for watts, tokens in known if tokens]
    paces = [one.tokens_per_s for one in row.repetitions if one.tokens_per_s]
    kwh, hour = prices.per_kwh, prices.rent_per_hour
    return Energy(
        row.target,
        row.level,
        _spread(watts for watts, _ in known),
        _spread(efficiency),
        None if kwh is None else _spread(1e6 / one / 3.6e6 * kwh for one in efficiency),
        None if hour is None else _spread(1e6 / pace / 3600 * hour for pace in paces),
    )


def mean_watts(one: Repetition, powers: Iterable[Power]) -> float | None:
    """What the cards drew in the window of a repetition; None where they were not looked at."""
    ended = one.began + one.window_s
    inside = [power for power in powers if one.began <= power.at <= ended]
    looks = [one.began, *(power.at for power in inside), ended]
    if not inside or max(b - a for a, b in itertools.pairwise(looks)) > LONGEST_GAP_S:
        return None
    return statistics.fmean(power.watts for power in inside)


def _spread(values: Iterable[float]) -> Spread | None:
    there = [*values]
    return Spread.of(there) if there else None
