"""How fast each lane loses request-seconds against the others: the table of regret rates.

Staying on the slower lane costs the seconds that its requests take longer there. Both
policies read their rates here, from the models' profiles and from the demand of the moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.routing.profile import Profile

#: The demand, in concurrent requests, at which one lane may be better than another.
DEMAND_RANGE = range(1, 33)

NO_LANES: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True)
class RoutedModel:
    """A model as a policy needs it: its lanes, and their profile."""

    lanes: tuple[str, ...]
    profile: Profile


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """The demand for one model at a moment.

    Attributes:
        n: Foreground requests that run or wait, stranded ones included.
        running: All requests that run, by lane.
        stranded: Foreground requests that wait for a lane that does not hold the GPU and
            that no other lane can serve now, by lane. Always empty in a shared placement.
    """

    n: int
    running: Mapping[str, int]
    stranded: Mapping[str, int]


class ModelRegret:
    """One model's demand, and its regret rates by whole numbers of concurrent requests."""

    __slots__ = ("_pairs", "_rates", "flexible", "lanes", "n", "profile", "running", "stranded")

    def __init__(self, lanes: Sequence[str], model: RoutedModel) -> None:
        self.lanes = tuple(lane for lane in lanes if lane in model.lanes)
        self._pairs = [(here, there) for here in lanes for there in lanes if here != there]
        self.set_profile(model.profile)
        self.n = 0
        self.flexible = 0  # requests of these n that are not stranded
        self.running: Mapping[str, int] = {}
        self.stranded: Mapping[str, int] = {}

    def set_profile(self, profile: Profile) -> None:
        """Forget the rates of the profile before."""
        self.profile = profile
        self._rates: dict[tuple[str, str], list[float]] = {pair: [0.0] for pair in self._pairs}

    def set_demand(self, demand: ModelDemand) -> None:
        """Take the demand of this moment."""
        self.n = demand.n
        self.running = demand.running
        self.stranded = demand.stranded
        self.flexible = demand.n
        if demand.stranded:
            self.flexible = max(0, demand.n - sum(demand.stranded.values()))

    def rate_at(self, here: str, there: str, n: int) -> float:
        """Request-seconds a second lost here with n concurrent, less those lost over there."""
        table = self._rates[here, there]
        if n >= len(table):
            table.extend(self._rate(here, there, more) for more in range(len(table), 2 * n + 1))
        return table[n]

    def rate(self, here: str, there: str) -> float:
        """The regret rate at the present demand, stranded requests included."""
        rate = self.rate_at(here, there, self.flexible)
        if self.stranded:
            rate += self.stranded.get(there, 0) - self.stranded.get(here, 0)
        return rate

    def seconds(self, lane: str, n: int) -> float | None:
        """Mean seconds of a request with n concurrent; None where that is not known."""
        return self.profile.seconds(lane, n) if lane in self.lanes else None

    def _rate(self, here: str, there: str, n: int) -> float:
        if here not in self.lanes:
            return float(n) if there in self.lanes else 0.0
        if there not in self.lanes:
            return -float(n)
        here_s, there_s = self.seconds(here, n), self.seconds(there, n)
        if here_s is None or there_s is None:
            return 0.0  # not measured: no reason to move, and none to stay
        best = min(here_s, there_s)
        return n * (best / there_s - best / here_s)


class RegretRates:
    """The regret rates of all models that follow one policy, summed.

    Args:
        lanes: The lanes' names.
        models: The models by name.
    """

    def __init__(self, lanes: Sequence[str], models: Mapping[str, RoutedModel]) -> None:
        self.lanes = tuple(lanes)
        self.models = {name: ModelRegret(lanes, model) for name, model in models.items()}
        self.demand = 0
        self.running = 0
        self._dominates = self._dominating_pairs()

    def set_demand(self, name: str, demand: ModelDemand) -> None:
        """Take one model's demand; that of the others is as last set."""
        model = self.models[name]
        self.demand += demand.n - model.n
        self.running += sum(demand.running.values()) - sum(model.running.values())
        model.set_demand(demand)

    def set_profile(self, name: str, profile: Profile) -> None:
        """Take what is known of a model now."""
        self.models[name].set_profile(profile)
        self._dominates = self._dominating_pairs()

    def against(self, here: str) -> dict[str, float]:
        """Request-seconds a second lost by staying here, against each other lane."""
        rates: dict[str, float] = {}
        for there in self.lanes:
            if there != here:
                rate = 0.0
                for model in self.models.values():
                    rate += model.rate(here, there)
                rates[there] = rate
        return rates

    def dominates(self, there: str, here: str) -> bool:
        """Whether a lane is better than another at any demand."""
        return (here, there) in self._dominates

    def stranded_lanes(self) -> set[str]:
        """The lanes that any stranded request waits for."""
        return {
            lane
            for model in self.models.values()
            for lane, requests in model.stranded.items()
            if requests
        }

    def compare(self, name: str, here: str) -> Comparison | None:
        """A model's seconds a request here and on the fastest other lane; None: not measured."""
        model = self.models[name]
        n = max(1, model.n)
        here_s = model.seconds(here, n)
        others = [
            (seconds, lane)
            for lane in self.lanes
            if lane != here and (seconds := model.seconds(lane, n)) is not None
        ]
        if here_s is None or not others:
            return None
        there_s, there = min(others)
        return Comparison(n, here_s, there_s, there, model.profile.source)

    def _dominating_pairs(self) -> set[tuple[str, str]]:
        return {
            (here, there)
            for here in self.lanes
            for there in self.lanes
            if here != there
            and all(
                model.rate_at(here, there, n) > 0
                for model in self.models.values()
                for n in DEMAND_RANGE
            )
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two lanes at one demand `n`: mean seconds a request here, and there."""

    n: int
    here_s: float
    there_s: float
    there: str
    source: str

    @property
    def stays(self) -> bool:
        """Whether here is at least as fast."""
        return self.here_s <= self.there_s

    def __str__(self) -> str:
        return (
            f"faster at demand {self.n} by the {self.source} profile: "
            f"{self.here_s:.1f} s against {self.there_s:.1f} s on {self.there}"
        )


def best_of(rates: Mapping[str, float], default: str) -> tuple[str, float]:
    """The lane with the highest regret rate against it, and that rate; the first of equals."""
    best, highest = default, -math.inf
    for lane, rate in rates.items():
        if rate > highest:
            best, highest = lane, rate
    return best, highest
