"""The policies that are compared: the gateway's, one engine all the time, and simple rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gateway.gpu.state import GpuState, GpuStateRef, Step
from gateway.routing.policy_exclusive import ExclusivePolicy
from gateway.routing.profile import Profile
from gateway.routing.regret import ModelDemand, RoutedModel
from gateway.routing.switch_cost import HandoverCost
from gateway.simulate.choices import ALWAYS, OURS
from gateway.simulate.simulator import SimulatedPolicy

MODEL = "simulated"
#: A common rule of thumb: above 8 requests the one engine, below 3 the other, stay 30 s.
HIGH_DEMAND, LOW_DEMAND, DWELL_S = 8, 3, 30.0


def make_policy(
    name: str, lanes: Sequence[str], profile: Profile, handover_s: float
) -> SimulatedPolicy:
    """The policy of this name; `always-LANE` keeps the GPU on one lane."""
    if name == OURS:
        return GatewayPolicy(lanes, profile, handover_s)
    if name == "crossover":
        return CrossoverRule(lanes, profile)
    if name == "high-low":
        high = "vllm" if "vllm" in lanes else lanes[-1]
        return HighLowRule(next(lane for lane in lanes if lane != high), high)
    return FixedLane(name.removeprefix(f"{ALWAYS}-"))


class GatewayPolicy:
    """The gateway's policy itself, for a single model."""

    def __init__(self, lanes: Sequence[str], profile: Profile, handover_s: float) -> None:
        self._gpu = GpuStateRef(GpuState(Step.HELD, lanes[0], lanes[0]))
        models = {MODEL: RoutedModel(tuple(lanes), profile)}
        cost = HandoverCost(assumed_s=handover_s)
        self.policy = ExclusivePolicy(lanes, models, cost, self._gpu)

    @property
    def lane(self) -> str:
        """See `SimulatedPolicy.lane`."""
        return self.policy.lane

    def observe(self, now: float, demand: int, running: Mapping[str, int]) -> bool:
        """See `SimulatedPolicy.observe`."""
        move = self.policy.observe(now, MODEL, ModelDemand(demand, running, {}))
        if move is None:
            return False
        self._gpu.state = GpuState(Step.DRAINING, move.source, move.target, move)
        return True

    def settled(self, now: float, lane: str) -> None:
        """See `SimulatedPolicy.settled`."""
        move = self._gpu.state.move
        self.policy.advance(now)
        self._gpu.state = GpuState(Step.HELD, lane, lane)
        self.policy.on_settled(now, move)

    def due(self) -> float:
        """See `SimulatedPolicy.due`."""
        return self.policy.due()


class FixedLane:
    """One lane all the time."""

    def __init__(self, lane: str) -> None:
        self.lane = lane

    def observe(self, now: float, demand: int, running: Mapping[str, int]) -> bool:
        """Always False."""
        return False

    def settled(self, now: float, lane: str) -> None:
        """Does nothing: there is no hand-over."""

    def due(self) -> float:
        """Always inf."""
        return math.inf


class _Rule(FixedLane):
    """The lane follows from the demand; it moves whenever that is another lane and it may."""

    def __init__(self, lane: str) -> None:
        super().__init__(lane)
        self._moving = False
        self._demand = 0
        self._settled_at = -math.inf

    def lane_at(self, demand: int) -> str:
        """The lane at this demand."""
        raise NotImplementedError

    def may_move_at(self) -> float:
        """The earliest time of the next move."""
        return -math.inf

    def observe(self, now: float, demand: int, running: Mapping[str, int]) -> bool:
        """See `SimulatedPolicy.observe`."""
        self._demand = demand
        lane = self.lane_at(demand)
        if self._moving or lane == self.lane or now < self.may_move_at():
            return False
        self.lane = lane
        self._moving = True
        return True

    def settled(self, now: float, lane: str) -> None:
        """See `SimulatedPolicy.settled`."""
        self._moving = False
        self._settled_at = now

    def due(self) -> float:
        """See `SimulatedPolicy.due`."""
        waits = not self._moving and self.lane_at(self._demand) != self.lane
        return self.may_move_at() if waits else math.inf


class CrossoverRule(_Rule):
    """The faster lane at the present demand, as if a move cost nothing."""

    def __init__(self, lanes: Sequence[str], profile: Profile) -> None:
        super().__init__(lanes[0])
        self._lanes = tuple(lanes)
        self._profile = profile

    def lane_at(self, demand: int) -> str:
        """See `_Rule.lane_at`."""
        if demand == 0:
            return self.lane
        seconds = {lane: self._profile.seconds(lane, demand) or math.inf for lane in self._lanes}
        return (
            self.lane
            if seconds[self.lane] <= min(seconds.values())
            else min(seconds, key=lambda lane: seconds[lane])
        )


class HighLowRule(_Rule):
    """Two thresholds and a dwell time, as found in many configuration files."""

    def __init__(self, low: str, high: str) -> None:
        super().__init__(low)
        self._low = low
        self._high = high

    def lane_at(self, demand: int) -> str:
        """See `_Rule.lane_at`."""
        if demand > HIGH_DEMAND:
            return self._high
        return self._low if demand < LOW_DEMAND else self.lane

    def may_move_at(self) -> float:
        """See `_Rule.may_move_at`."""
        return self._settled_at + DWELL_S


class Schedule(_Rule):
    """Moves at times that are known in advance."""

    def __init__(self, moves: Sequence[tuple[float, str]]) -> None:
        super().__init__(moves[0][1])
        self._moves = list(moves[1:])

    def observe(self, now: float, demand: int, running: Mapping[str, int]) -> bool:
        """See `SimulatedPolicy.observe`."""
        if self._moving or not self._moves or now < self._moves[0][0]:
            return False
        self.lane = self._moves.pop(0)[1]
        self._moving = True
        return True

    def due(self) -> float:
        """See `SimulatedPolicy.due`."""
        return self._moves[0][0] if self._moves and not self._moving else math.inf
