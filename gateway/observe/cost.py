"""What tokens cost: watts and seconds added up by lane, and set against prices.

Pure arithmetic. All energy and every hour since the start count, idle ones too: the machine
was there for whoever might have asked. While requests run, what passes is theirs, divided by
how many run on each lane; while nobody asks it is idle, and the lanes share that by their
busy time. So what the lanes have used is together what the machine has used.

Watts are measured or given, never reckoned. While nobody tells them neither energy nor the
tokens of that time count for what is said of energy, so that a gap flatters nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from gateway.settings import Prices

JOULES_PER_KWH = 3.6e6
SECONDS_PER_HOUR = 3600.0
MILLION = 1e6

#: Over a longer gap between two looks nobody knows what was drawn, seconds.
LONGEST_GAP_S = 10.0


@dataclass(frozen=True, slots=True)
class Use:
    """What was used, and the output tokens that came of it.

    `metered` are those of them that came while the watts were known: the tokens of `joules`.
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
        """None: no watts were known, or no token came meanwhile."""
        return self.metered / self.joules if self.joules and self.metered else None


@dataclass(frozen=True, slots=True)
class Bill:
    """What a million output tokens cost, in the currency of the prices. None: not known.

    `api` is what somebody else asks for as many.
    """

    electricity: float | None
    rent: float | None
    api: float | None


def bill(use: Use, prices: Prices) -> Bill:
    """What a million tokens of this use cost."""
    electricity = rent = None
    if prices.per_kwh is not None and (per_joule := use.tokens_per_joule):
        electricity = MILLION / per_joule / JOULES_PER_KWH * prices.per_kwh
    if prices.rent_per_hour is not None and use.seconds and use.tokens:
        rent = MILLION * use.seconds / use.tokens / SECONDS_PER_HOUR * prices.rent_per_hour
    return Bill(electricity, rent, prices.api_per_million)


@dataclass(slots=True)
class Meter:
    """Adds up what the machine uses, from looks at it: who runs, and how many watts it draws.

    `idle` is what passed while nobody ran, `busy` by lane what passed while somebody did.
    `watts` are those of the last look.
    """

    watts: float | None = None
    idle: Use = Use()
    busy: dict[str, Use] = field(default_factory=dict)
    _at: float | None = None

    def looked(self, now: float, watts: float | None, running: Mapping[str, int]) -> None:
        """At this moment so many requests run on each lane, and the machine draws this.

        Args:
            now: Seconds on a steady clock.
            watts: None: nobody tells.
            running: Requests by lane.
        """
        before, self.watts = self.watts, watts
        seconds = now - self._at if self._at is not None else 0.0
        self._at = now
        joules = 0.0
        if watts is not None and before is not None and seconds <= LONGEST_GAP_S:
            joules = seconds * (before + watts) / 2
        everybody = sum(running.values())
        if not everybody:
            self.idle += Use(seconds, joules)
        for lane, here in running.items():
            if here:
                share = here / everybody
                self.busy[lane] = self.busy.get(lane, Use()) + Use(seconds * share, joules * share)

    def came(self, lane: str, tokens: int) -> None:
        """An answer of a lane had so many tokens."""
        metered = tokens if self.watts is not None else 0
        self.busy[lane] = self.busy.get(lane, Use()) + Use(tokens=tokens, metered=metered)

    def whole(self) -> Use:
        """What the machine has used."""
        return sum(self.busy.values(), self.idle)

    def shares(self) -> dict[str, Use]:
        """What each lane has used, with its share of the idle time: together the whole."""
        busy_s = sum(use.seconds for use in self.busy.values())
        if not busy_s:
            return dict(self.busy)
        idle = {lane: use.seconds / busy_s for lane, use in self.busy.items()}
        return {
            lane: use + Use(self.idle.seconds * idle[lane], self.idle.joules * idle[lane])
            for lane, use in self.busy.items()
        }


def statement(meter: Meter, prices: Prices) -> dict[str, object] | None:
    """What was used and what it has cost, as JSON; None where nothing is known of that."""
    whole = meter.whole()
    priced = (prices.per_kwh, prices.rent_per_hour, prices.api_per_million)
    if not whole.joules and meter.watts is None and all(price is None for price in priced):
        return None
    return {
        "currency": prices.currency,
        "watts": meter.watts,
        "watts_are": "given" if prices.watts else "measured",
        "idle": _account(meter.idle, prices),
        "whole": _account(whole, prices),
        "lanes": {lane: _account(use, prices) for lane, use in meter.shares().items()},
    }


def _account(use: Use, prices: Prices) -> dict[str, object]:
    return {
        "seconds": use.seconds,
        "joules": use.joules or None,
        "tokens": use.tokens,
        "tokens_per_joule": use.tokens_per_joule,
        "per_million": asdict(bill(use, prices)),
    }
