"""What it costs to change lanes, in request-seconds, by placement.

Where both lanes are resident a switch delays only the requests it overlaps with
(`SharedSwitchCost`). Where one GPU is handed over it delays every request, and what that
costs is learned from the hand-overs that were made (`HandoverCost`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

#: Shared placement. What a request still running on the lane that is left adds to the cost,
#: as a share of its seconds there: both engines then compute on the same cards. Assumed; on
#: two CPU cores llama.cpp took ten times as long beside a busy vLLM, and slowed that by half.
OVERLAP_SHARE = 1.0
#: Shared placement. The least a switch costs, as a share of the seconds of a lone request on
#: the lane that is left: a crowd that asks in waves has moments without demand, and the first
#: request of a wave must not lead it away and back. Assumed.
LEAST_SHARE = 0.25
#: Shared placement. After so many seconds without demand a switch costs nothing. Assumed.
IDLE_RESET_S = 10.0

#: How many round trips staying must have cost before a hand-over pays. Theory asks for half
#: of one; demand is lower on the faster lane just because it is faster, so the regret of the
#: slower one is underestimated. Chosen in simulation, over seeds.
ROUND_TRIPS = 1.5
#: No hand-over is assumed to take less, seconds: what it disturbs besides (prompt caches,
#: streams held back) is not in its cost. Chosen in simulation, over seeds.
SHORTEST_HANDOVER_S = 15.0
#: The weight of the newest hand-over in the mean cost, once there were a few.
NEWEST_HANDOVER = 0.25
#: The most by which hand-overs that did not pay multiply the threshold.
MAX_CAUTION = 16.0
#: How far back the comparison of the lanes' costs reaches, and how long a move counts, seconds.
HOUR_S = 3600.0

#: Request-seconds that are none: floating-point sums may be off by so much, and what is due
#: at a moment must still happen at that moment.
NEGLIGIBLE = 1e-6


class SharedSwitchCost:
    """The cost of a switch where both lanes are resident: a shared placement.

    It delays only the requests it overlaps with: those still running on the lane it leaves.
    Without any it is near zero, a part of one request's seconds, which a lone user has lost
    after one request. After `IDLE_RESET_S` without demand it is zero.
    """

    def __init__(self) -> None:
        self._busy_at = -math.inf  # when there was demand last
        self._idle = True

    def advance(self, now: float, demand: int) -> None:
        """Until now there was this demand."""
        if demand:
            self._busy_at = now
        self._idle = now - self._busy_at > IDLE_RESET_S

    def threshold(self, alone_s: float | None, here_s: float | None, running: int) -> float:
        """Request-seconds that staying must have lost before a switch pays.

        Args:
            alone_s: Seconds of a lone request on the lane that is left; None: not measured.
            here_s: Seconds of a request there at the present demand; None: not measured.
            running: Requests that run there.
        """
        if alone_s is None or here_s is None:
            return 0.0
        least = 0.0 if self._idle else LEAST_SHARE * alone_s
        return max(least, OVERLAP_SHARE * here_s * running)


class HandoverCost:
    """The cost of a move where one GPU is handed over: an exclusive placement.

    A move costs the request-seconds that requests waited because of it. Its estimate is the
    mean of those before, each direction for itself. The threshold is one and a half round
    trips, times the caution about the target. A stay there that did not earn its round trip
    doubles the caution, and so does a failed move; a stay that did halves it.

    Args:
        assumed_s: Seconds of a hand-over, until one was seen.
        moves_per_hour: How many moves for speed any hour may have.
        patience_s: How long a request waits for a layout that does not hold the GPU, where
            no other can serve it, before the GPU is moved for it.
    """

    def __init__(
        self, assumed_s: float = 12.0, moves_per_hour: int = 2, patience_s: float = 30.0
    ) -> None:
        self.assumed_s = assumed_s
        self.moves_per_hour = moves_per_hour
        self.patience_s = patience_s
        self.waited_s = 0.0  # request-seconds, of all that ever waited
        self._history: dict[tuple[str, str], _History] = {}
        self._caution: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._not_before = -math.inf  # after a failure nothing is tried for a while
        self._counted: deque[float] = deque(maxlen=max(1, 2 * moves_per_hour))
        # The recent past, fading: seconds with demand, their request-seconds, and those
        # that each layout would have lost against the one that held.
        self._busy_s = 0.0
        self._demand_s = 0.0
        self._lost: dict[str, float] = {}
        # The present stay, and the move under way.
        self._held_at = -math.inf
        self._former: str | None = None  # None: the present layout did not come for speed
        self._way_back: str | None = None  # where a forced move came from: exempt from the limit
        self._earned = 0.0
        self._began_at = 0.0
        self._waited_before = 0.0

    # Time passes

    def advance(self, seconds: float, demand: int, layout: str, rates: Mapping[str, float]) -> None:
        """For so long a layout held with this demand, at these regret rates against the others."""
        fade = math.exp(-seconds / HOUR_S)
        self._busy_s *= fade
        self._demand_s *= fade
        if demand:
            self._busy_s += seconds
            self._demand_s += seconds * demand
        if layout not in self._lost:
            self._lost[layout] = 0.0
        for name in self._lost:
            self._lost[name] *= fade
        for there, rate in rates.items():
            self._lost[there] = self._lost.get(there, 0.0) - rate * seconds
        if self._former is not None:
            self._earned -= rates.get(self._former, 0.0) * seconds

    def add_waiting(self, seconds: float, requests: int) -> None:
        """For so long so many requests waited for a layout to hold the GPU."""
        self.waited_s += seconds * requests

    # Hand-overs

    def on_start(self, now: float) -> None:
        """A hand-over begins."""
        self._began_at = now
        self._waited_before = self.waited_s

    def on_success(self, now: float, source: str, target: str, *, forced: bool) -> None:
        """The hand-over has brought the GPU to its target; `forced`: not for speed."""
        self._learn((source, target), now - self._began_at)
        if self._former is not None and not forced:
            trip = self._cost(self._former, source, 0.0) + self._cost(source, self._former, 0.0)
            self._judge(source, earned=self._earned >= trip)
        if forced:
            if self._way_back is None:
                self._way_back = source
        else:
            if target != self._way_back:
                self._counted.append(self._began_at)
            self._way_back = None
        self._former = None if forced else source
        self._earned = 0.0
        self._held_at = now
        self._failures.pop(target, None)

    def on_failure(self, now: float, target: str) -> None:
        """The hand-over has failed: the next waits, twice as long each time."""
        failures = self._failures[target] = self._failures.get(target, 0) + 1
        self._judge(target, earned=False)
        took = max(self.assumed_s, now - self._began_at)
        self._not_before = now + took * min(MAX_CAUTION, 2.0 ** (failures - 1))

    def on_adopted(self, now: float) -> None:
        """A layout holds the GPU without a move of the policy."""
        self._held_at = now
        self._former = self._way_back = None
        self._earned = 0.0

    def _learn(self, way: tuple[str, str], took_s: float) -> None:
        history = self._history.setdefault(way, _History())
        history.number += 1
        weight = max(1 / history.number, NEWEST_HANDOVER)
        history.cost += (self.waited_s - self._waited_before - history.cost) * weight
        history.seconds += (took_s - history.seconds) * weight

    def _judge(self, layout: str, *, earned: bool) -> None:
        caution = self._caution.get(layout, 1.0)
        self._caution[layout] = max(1.0, caution / 2) if earned else min(MAX_CAUTION, caution * 2)

    # What it costs, and when it may be

    def threshold(self, here: str, there: str, demand: int, *, dominates: bool) -> float:
        """Request-seconds that staying here must have lost before a move to there pays.

        `dominates`: it is better there at any demand, so there will be no way back to pay.
        """
        least = SHORTEST_HANDOVER_S * self._mean(demand)
        ways = [(here, there)] if dominates else [(here, there), (there, here)]
        trip = sum(max(least, self._cost(*way, demand)) for way in ways)
        return self._caution.get(there, 1.0) * (trip if dominates else ROUND_TRIPS * trip)

    def allowed_at(self, here: str, there: str, now: float, rate: float) -> float:
        """The moment from which a move for speed is allowed, if nothing changes.

        The limit is counted over two hours. Leaving the layout that was cheaper in the recent
        past needs two moves left, so that the way back is possible at any time; going to it
        needs one.
        """
        if there == self._way_back:
            return self._not_before
        if self.moves_per_hour < 1:
            return math.inf
        home_at = self._home_at(here, there, now, rate)
        return max(self._not_before, min(self._left_at(2), max(self._left_at(1), home_at)))

    def _left_at(self, moves: int) -> float:
        """The moment from which so many moves are left of those that two hours may have."""
        over = len(self._counted) + moves - 2 * self.moves_per_hour
        return self._counted[over - 1] + 2 * HOUR_S if over > 0 else -math.inf

    def forced_at(self, since: float, here: str, there: str) -> float:
        """The moment at which a move is made for requests that wait for it since then."""
        held = self._held_at + self.takes_s(here, there)
        return max(self._not_before, held, since + self.patience_s)

    @property
    def not_before(self) -> float:
        """Until when no move is tried, after one that failed."""
        return self._not_before

    def takes_s(self, here: str, there: str) -> float:
        """Seconds of a hand-over: as seen, else as the way back was, else assumed."""
        history = self._history.get((here, there)) or self._history.get((there, here))
        return history.seconds if history else self.assumed_s

    def _cost(self, here: str, there: str, demand: float) -> float:
        if history := self._history.get((here, there)):
            return history.cost
        return self.takes_s(here, there) * self._mean(demand)

    def _mean(self, demand: float) -> float:
        """Mean demand of the recent past, where there was any; at least one."""
        return max(1.0, self._demand_s / self._busy_s if self._busy_s else demand)

    def _home_at(self, here: str, there: str, now: float, rate: float) -> float:
        """The moment from which the recent past will have been cheaper over there."""
        saved = self._lost.get(here, 0.0) - self._lost.get(there, 0.0)
        if saved > -NEGLIGIBLE:
            return -math.inf
        if rate <= 0:
            return math.inf
        # saved(t) = saved * f + rate * HOUR_S * (1 - f), where f = exp(-t / HOUR_S)
        gain = rate * HOUR_S
        return now + HOUR_S * math.log((gain - saved) / gain)


@dataclass(slots=True)
class _History:
    """The hand-overs in one direction: how many, and their mean request-seconds and seconds."""

    number: int = 0
    cost: float = 0.0
    seconds: float = 0.0
