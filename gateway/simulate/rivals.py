"""What our policy is compared with: fixed lanes, thresholds, and who knows the future."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gateway.routing.policy import Demand, HandOver, Policy, Served
from gateway.routing.profile import Profile
from gateway.simulate.machine import Decider

MODEL = "simulated"
#: "More than 8 go to vLLM, fewer than 3 come back, and stay half a minute": a usual rule.
MANY, FEW, DWELL_S = 8, 3, 30.0


class Ours:
    """The gateway's own policy: the same object, told of one model."""

    def __init__(self, lanes: Sequence[str], profile: Profile, handover_s: float) -> None:
        price = HandOver(assumed_s=handover_s)
        self.policy = Policy(lanes, {MODEL: Served(tuple(lanes), profile)}, price)

    @property
    def lane(self) -> str:
        """See `Decider.lane`."""
        return self.policy.lane

    def observe(self, now: float, demand: int, running: Mapping[str, int]) -> bool:
        """See `Decider.observe`."""
        return self.policy.observe(now, MODEL, Demand(demand, running, {}))

    def settled(self, now: float, lane: str) -> None:
        """See `Decider.settled`."""
        self.policy.settled(now, lane)

    def due(self) -> float:
        """See `Decider.due`."""
        return self.policy.due()


class Always:
    """One lane, whatever happens."""

    def __init__(self, lane: str) -> None:
        self.lane = lane

    def observe(self, now: float, demand: int, running: Mapping[str, int]) -> bool:
        """Never."""
        return False

    def settled(self, now: float, lane: str) -> None:
        """There is no hand-over."""

    def due(self) -> float:
        """Never."""
        return math.inf


class _Rule(Always):
    """A lane that is wanted at a demand; moves whenever it is another, if it may."""

    def __init__(self, lane: str) -> None:
        super().__init__(lane)
        self._moving = False
        self._demand = 0
        self._settled_at = -math.inf

    def wanted(self, demand: int) -> str:
        """The lane at this demand."""
        raise NotImplementedError

    def may_at(self) -> float:
        """From when on it may move."""
        return -math.inf

    def observe(self, now: float, demand: int, running: Mapping[str, int]) -> bool:
        """See `Decider.observe`."""
        self._demand = demand
        wanted = self.wanted(demand)
        if self._moving or wanted == self.lane or now < self.may_at():
            return False
        self.lane = wanted
        self._moving = True
        return True

    def settled(self, now: float, lane: str) -> None:
        """See `Decider.settled`."""
        self._moving = False
        self._settled_at = now

    def due(self) -> float:
        """See `Decider.due`."""
        waits = not self._moving and self.wanted(self._demand) != self.lane
        return self.may_at() if waits else math.inf


class Crossover(_Rule):
    """Always the faster lane at this demand, as if a move cost nothing."""

    def __init__(self, lanes: Sequence[str], profile: Profile) -> None:
        super().__init__(lanes[0])
        self._lanes = tuple(lanes)
        self._profile = profile

    def wanted(self, demand: int) -> str:
        """See `_Rule.wanted`."""
        if demand == 0:
            return self.lane
        seconds = {lane: self._profile.seconds(lane, demand) or math.inf for lane in self._lanes}
        return (
            self.lane
            if seconds[self.lane] <= min(seconds.values())
            else min(seconds, key=lambda lane: seconds[lane])
        )


class HighLow(_Rule):
    """Two thresholds and a dwell, as people write them."""

    def __init__(self, few: str, many: str) -> None:
        super().__init__(few)
        self._few = few
        self._many = many

    def wanted(self, demand: int) -> str:
        """See `_Rule.wanted`."""
        if demand > MANY:
            return self._many
        return self._few if demand < FEW else self.lane

    def may_at(self) -> float:
        """See `_Rule.may_at`."""
        return self._settled_at + DWELL_S


class Schedule(_Rule):
    """Lanes by time, known beforehand."""

    def __init__(self, plan: Sequence[tuple[float, str]]) -> None:
        super().__init__(plan[0][1])
        self._plan = list(plan[1:])

    def observe(self, now: float, demand: int, running: Mapping[str, int]) -> bool:
        """See `Decider.observe`."""
        if self._moving or not self._plan or now < self._plan[0][0]:
            return False
        self.lane = self._plan.pop(0)[1]
        self._moving = True
        return True

    def due(self) -> float:
        """See `Decider.due`."""
        return self._plan[0][0] if self._plan and not self._moving else math.inf


def make(name: str, lanes: Sequence[str], profile: Profile, handover_s: float) -> Decider:
    """A policy by its name; `always-` and a lane is one of them."""
    if name == "ours":
        return Ours(lanes, profile, handover_s)
    if name == "crossover":
        return Crossover(lanes, profile)
    if name == "high-low":
        many = "vllm" if "vllm" in lanes else lanes[-1]
        return HighLow(next(lane for lane in lanes if lane != many), many)
    return Always(name.removeprefix("always-"))
