"""Power draw of a target, and what its output tokens cost."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence

import msgspec

from loadtests.analysis.rows import Repetition, Row
from loadtests.analysis.spread import Spread
from loadtests.measure.experiment import Prices
from loadtests.measure.samples import Power

#: Longest time between two power samples, seconds: with more, the mean power is not known.
MAX_POWER_GAP_S = 5.0


class Energy(msgspec.Struct, frozen=True, omit_defaults=True):
    """Power and cost of a target at a level; None: not known.

    Attributes:
        watts: Configured, or measured at the cards: mean over the window.
        electricity: Price of the electricity for a million output tokens.
        rent: Price of the machine for as long as a million output tokens take.
    """

    target: str
    level: int
    watts: Spread | None = None
    tokens_per_joule: Spread | None = None
    electricity: Spread | None = None
    rent: Spread | None = None


def energy_by_row(table: Iterable[Row], powers: Sequence[Power], prices: Prices) -> list[Energy]:
    """Power and cost of each row; a row of which neither is known is left out."""
    found = [_energy(row, powers, prices) for row in table]
    return [one for one in found if one.watts or one.rent]


def _energy(row: Row, powers: Sequence[Power], prices: Prices) -> Energy:
    every = [(prices.watts or mean_watts(one, powers), one) for one in row.repetitions]
    known = [(watts, one.tokens_per_s) for watts, one in every if watts]
    efficiency = [tokens / watts for watts, tokens in known if tokens]
    rates = [one.tokens_per_s for one in row.repetitions if one.tokens_per_s]
    kwh, hour = prices.per_kwh, prices.rent_per_hour
    return Energy(
        row.target,
        row.level,
        _spread(watts for watts, _ in known),
        _spread(efficiency),
        None if kwh is None else _spread(1e6 / one / 3.6e6 * kwh for one in efficiency),
        None if hour is None else _spread(1e6 / rate / 3600 * hour for rate in rates),
    )


def mean_watts(one: Repetition, powers: Iterable[Power]) -> float | None:
    """Mean power of the cards in the window of a repetition; None if samples are missing."""
    ended = one.began + one.window_s
    inside = [power for power in powers if one.began <= power.at <= ended]
    times = [one.began, *(power.at for power in inside), ended]
    if not inside or max(b - a for a, b in itertools.pairwise(times)) > MAX_POWER_GAP_S:
        return None
    return statistics.fmean(power.watts for power in inside)


def _spread(values: Iterable[float]) -> Spread | None:
    known = [*values]
    return Spread.of(known) if known else None
