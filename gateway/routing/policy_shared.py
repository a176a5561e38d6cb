"""Which lane a model's requests go to where its lanes are resident together: rent or buy.

No clock, no sockets, no tasks: time and demand come in, the lane comes out. Staying on the
slower lane costs regret, the request-seconds lost against the other one. Switching costs
what `switch_cost` says. The policy switches when the regret has reached that cost (Borodin,
Linial and Saks, J. ACM 39, 1992): how long it hesitates follows from what a switch costs,
and no threshold or dwell time has to be guessed.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence

from gateway.routing.lanes import PINNED
from gateway.routing.profile import Profile
from gateway.routing.regret import ModelDemand, RegretRates, RoutedModel, best_of
from gateway.routing.switch_cost import NEGLIGIBLE, SharedSwitchCost


class SharedPolicy:
    """The lane of one model whose lanes fit into memory together, chosen by demand.

    Args:
        lanes: The lanes' names, the first to begin with.
        models: The model, by name.
        pin: The operator's lane; None: the policy decides.

    Attributes:
        lane: Where requests go.
        regret: Request-seconds lost by staying, net, since the last switch.
        moves: How often it has switched.
    """

    def __init__(
        self, lanes: Sequence[str], models: Mapping[str, RoutedModel], *, pin: str | None = None
    ) -> None:
        self.lane = lanes[0]
        self.regret = 0.0
        self.moves = 0
        self.pin = pin
        self._rates = RegretRates(lanes, models)
        self._cost = SharedSwitchCost()
        [self._model] = self._rates.models.values()
        self._at = 0.0
        self._best, self._rate = self.lane, 0.0

    def __repr__(self) -> str:
        return (
            f"<SharedPolicy {self.lane}, regret {self.regret:.1f} of {self.price:.1f}, "
            f"{self.moves} moves>"
        )

    @property
    def price(self) -> float:
        """What leaving the lane costs now, request-seconds."""
        model = self._model
        return self._cost.threshold(
            model.seconds(self.lane, 1),
            model.seconds(self.lane, model.n),
            model.running.get(self.lane, 0),
        )

    def pinned_lane(self, lanes: Container[str]) -> str | None:
        """The lane to which the operator's pin sends every request, or None."""
        return self.pin

    def reason(self, model: str) -> str:
        """Why this lane, in words and numbers for the `X-Gateway-Reason` header."""
        if self.pin == self.lane:
            return PINNED
        if len(self._model.lanes) == 1:
            return "the model's only lane"
        comparison = self._rates.compare(model, self.lane)
        if comparison is None:
            return "not measured"
        if comparison.stays:
            return str(comparison)
        return (
            f"a move to {comparison.there} does not pay yet: regret {self.regret:.1f} of "
            f"{self.price:.1f} request-seconds at demand {comparison.n}"
        )

    def observe(self, now: float, model: str, demand: ModelDemand) -> bool:
        """Take the demand of this moment; True when the lane has just changed.

        Args:
            now: Seconds on any steady clock.
            model: The model's name.
            demand: Its demand now.
        """
        if len(self._rates.lanes) == 1:
            self._model.set_demand(demand)
            return False
        self._advance(now)
        self._rates.set_demand(model, demand)
        self._update_regret_rates()
        pays = self._rate > 0 and self.regret >= self.price - NEGLIGIBLE
        if not self._rates.demand or not pays:
            return False
        self.lane = self._best
        self.regret = 0.0
        self.moves += 1
        self._update_regret_rates()
        return True

    def refine(self, now: float, model: str, profile: Profile) -> None:
        """Take a model's better profile; the regret so far stays."""
        self._advance(now)
        self._rates.set_profile(model, profile)
        self._update_regret_rates()

    def due(self) -> float:
        """The moment at which it will switch if nothing changes before; inf: never."""
        if self._rate <= 0:
            return math.inf
        return self._at + (self.price - self.regret) / self._rate

    def _advance(self, now: float) -> None:
        passed = now - self._at
        self._at = now
        self._cost.advance(now, self._rates.demand)
        self.regret = max(0.0, self.regret + self._rate * passed)

    def _update_regret_rates(self) -> None:
        if len(self._rates.lanes) > 1:
            self._best, self._rate = best_of(self._rates.against(self.lane), self.lane)
