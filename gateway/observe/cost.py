"""What tokens cost: energy and seconds added up by lane, and multiplied by prices.

Pure arithmetic. All energy and every hour since the start count, idle ones too: the machine
was ready for requests all the time. While requests run, time and energy belong to their
lanes, by the number of requests on each. While none runs the machine is idle, and the lanes
share that by their busy time. So the shares of the lanes add up to the machine.

Watts are measured or given, never estimated. While they are unknown, neither the energy nor
the tokens of that time enter any figure of energy, so that a gap flatters no lane.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.observe.status import Account, Bill, CostStatement
from gateway.settings import Prices

JOULES_PER_KWH = 3.6e6
SECONDS_PER_HOUR = 3600.0
MILLION = 1e6

#: Over a longer gap between two samples the energy is unknown, seconds.
LONGEST_GAP_S = 10.0


@dataclass(frozen=True, slots=True)
class Use:
    """Seconds and joules that were used, and the output tokens that came of it.

    `metered` are those tokens that came while the watts were known: the tokens of `joules`.
    """

    seconds: float = 0.0
    joules: float = 0.0
    tokens: int = 0
    metered: int = 0

    def __add__(self, other: Use) -> Use:
        return Use(
            self.seconds + other.seconds,
            self.joules + other.joules,
            self.tokens + other.tokens,
            self.metered + other.metered,
        )

    @property
    def tokens_per_joule(self) -> float | None:
        """Output tokens per joule; None where no watts were known, or no token came."""
        return self.metered / self.joules if self.joules and self.metered else None


def bill(use: Use, prices: Prices) -> Bill:
    """The cost of a million output tokens at this use."""
    electricity = rent = None
    if prices.per_kwh is not None and (per_joule := use.tokens_per_joule):
        electricity = MILLION / per_joule / JOULES_PER_KWH * prices.per_kwh
    if prices.rent_per_hour is not None and use.seconds and use.tokens:
        rent = MILLION * use.seconds / use.tokens / SECONDS_PER_HOUR * prices.rent_per_hour
    return Bill(electricity, rent, prices.api_per_million)


@dataclass(slots=True)
class Meter:
    """Adds up what the machine uses, from samples of running requests and watts.

    Attributes:
        watts: Power draw at the last sample; None: unknown.
        idle: Used while no request ran.
        busy: Used while requests ran, by lane.
    """

    watts: float | None = None
    idle: Use = Use()
    busy: dict[str, Use] = field(default_factory=dict)
    _at: float | None = None

    def sample(self, now: float, watts: float | None, running: Mapping[str, int]) -> None:
        """Add what was used since the last sample.

        Args:
            now: Seconds on a monotonic clock.
            watts: Power draw of the machine; None: unknown.
            running: Running requests by lane.
        """
        before, self.watts = self.watts, watts
        seconds = now - self._at if self._at is not None else 0.0
        self._at = now
        joules = 0.0
        if watts is not None and before is not None and seconds <= LONGEST_GAP_S:
            joules = seconds * (before + watts) / 2
        total = sum(running.values())
        if not total:
            self.idle += Use(seconds, joules)
        for lane, requests in running.items():
            if requests:
                share = requests / total
                self.busy[lane] = self.busy.get(lane, Use()) + Use(seconds * share, joules * share)

    def add_tokens(self, lane: str, tokens: int) -> None:
        """Count the output tokens of an answer."""
        metered = tokens if self.watts is not None else 0
        self.busy[lane] = self.busy.get(lane, Use()) + Use(tokens=tokens, metered=metered)

    def total(self) -> Use:
        """What the machine has used."""
        return sum(self.busy.values(), self.idle)

    def shares(self) -> dict[str, Use]:
        """What each lane has used, with its share of the idle time; they add up to `total()`."""
        busy_s = sum(use.seconds for use in self.busy.values())
        if not busy_s:
            return dict(self.busy)
        idle = {lane: use.seconds / busy_s for lane, use in self.busy.items()}
        return {
            lane: use + Use(self.idle.seconds * idle[lane], self.idle.joules * idle[lane])
            for lane, use in self.busy.items()
        }


def statement(meter: Meter, prices: Prices) -> CostStatement | None:
    """What was used and what it has cost; None where neither watts nor prices are known."""
    total = meter.total()
    priced = (prices.per_kwh, prices.rent_per_hour, prices.api_per_million)
    if not total.joules and meter.watts is None and all(price is None for price in priced):
        return None
    return CostStatement(
        currency=prices.currency,
        watts=meter.watts,
        watts_are="given" if prices.watts else "measured",
        idle=_account(meter.idle, prices),
        whole=_account(total, prices),
        lanes={lane: _account(use, prices) for lane, use in meter.shares().items()},
    )


def _account(use: Use, prices: Prices) -> Account:
    return Account(
        use.seconds, use.joules or None, use.tokens, use.tokens_per_joule, bill(use, prices)
    )
