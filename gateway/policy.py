"""Which lane a model's requests should go to: rent or buy.

No clock, no sockets, no tasks: time and demand come in, the lane comes out. Staying on
the slower lane costs rent, the request-seconds lost against the other one. Moving costs
a price. The policy moves when the rent has reached the price (Borodin, Linial and Saks,
J. ACM 39, 1992), so that how long it hesitates follows from what a move costs, and
nobody has to guess a threshold or a dwell time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gateway.profile import Profile

#: What a request still running on the lane that is left costs a move in a shared
#: placement, as a share of what it takes there: both engines then compute on the same
#: cards. Assumed; on two CPU cores llama.cpp was seen to take ten times as long beside a
#: busy vLLM, and to slow that by half.
OVERLAP = 1.0
#: The least a move costs, as a share of what a request takes alone on the lane that is
#: left: a crowd that asks in waves has moments of nobody, and must not be led away and
#: back by the first of each wave. Assumed.
LEAST = 0.25
#: After so many seconds of nobody the crowd is gone, and a move costs nothing. Assumed.
FORGOTTEN_S = 10.0

#: Request-seconds that are none: so far may floating-point sums be off, after which
#: what is due at a moment must still happen at that moment.
NEGLIGIBLE = 1e-6


class Policy:
    """The lane of one model, chosen by demand.

    Args:
        lanes: The lanes' names, the one to begin with first.
        profile: What the choice is made by.

    In a shared placement a move delays nobody but those it overlaps with, so its price
    is that of the requests still running on the lane it leaves. With none of them it is
    near zero: a part of one request's time, which one person alone has paid after one.
    When nobody has been there for a while it is zero: the faster lane at this demand.
    """

    def __init__(self, lanes: Sequence[str], profile: Profile) -> None:
        self.lane = lanes[0]
        self.regret = 0.0
        self.moves = 0
        self._lanes = tuple(lanes)
        self._profile = profile
        self._demand = 0
        self._running: dict[str, int] = dict.fromkeys(lanes, 0)
        self._at = 0.0
        self._busy_at = -math.inf  # when somebody was last there
        self._forgotten = True

    def __repr__(self) -> str:
        return f"<Policy {self.lane}, {self.reason}>"

    @property
    def source(self) -> str:
        """Where the profile comes from: `measured` or `assumed`."""
        return self._profile.source

    @property
    def price(self) -> float:
        """What leaving this lane costs now, request-seconds."""
        alone, here = self._seconds(self.lane, 1), self._seconds(self.lane, self._demand)
        if alone is None or here is None:
            return 0.0
        least = 0.0 if self._forgotten else LEAST * alone
        return max(least, OVERLAP * here * self._running[self.lane])

    @property
    def reason(self) -> str:
        """Why this lane, in words and numbers for the `X-Gateway-Reason` header."""
        if len(self._lanes) == 1:
            return "the model's only lane"
        n = max(1, self._demand)
        here, other = self._seconds(self.lane, n), self._best_other(n)
        if here is None or other is None:
            return "not measured"
        name, there = other
        compared = f"{here:.1f} s against {there:.1f} s on {name}"
        if here <= there:
            return f"faster at demand {n} by the {self.source} profile: {compared}"
        return (
            f"a move to {name} does not pay yet: regret {self.regret:.1f} of "
            f"{self.price:.1f} request-seconds at demand {n}"
        )

    def observe(self, now: float, demand: int, running: dict[str, int]) -> bool:
        """Take the state of this moment; True when the lane has changed.

        Args:
            now: Seconds on any steady clock.
            demand: Foreground requests that run or wait.
            running: Of all requests, how many run on each lane.
        """
        if len(self._lanes) == 1:
            return False
        if self._demand:
            self._busy_at = now
        self._forgotten = now - self._busy_at > FORGOTTEN_S
        self.regret = max(0.0, self.regret + self._rent() * (now - self._at))
        self._at = now
        self._demand = demand
        self._running.update(running)
        if demand == 0 or self._rent() <= 0 or self.regret < self.price - NEGLIGIBLE:
            return False
        best = self._best_other(demand)
        if best is None:
            return False
        self.lane = best[0]
        self.regret = 0.0
        self.moves += 1
        return True

    def due(self) -> float:
        """The moment at which the rent reaches the price if nothing changes before."""
        rent = self._rent()
        return self._at + (self.price - self.regret) / rent if rent > 0 else math.inf

    def _rent(self) -> float:
        """Request-seconds lost a second here, less those that would be lost there."""
        if self._demand == 0:
            return 0.0
        here, other = self._seconds(self.lane, self._demand), self._best_other(self._demand)
        if here is None or other is None:
            return 0.0
        there = other[1]
        best = min(here, there)
        return self._demand * (best / there - best / here)

    def _best_other(self, demand: int) -> tuple[str, float] | None:
        known = [
            (seconds, name)
            for name in self._lanes
            if name != self.lane and (seconds := self._seconds(name, demand)) is not None
        ]
        return (min(known)[1], min(known)[0]) if known else None

    def _seconds(self, lane: str, demand: int) -> float | None:
        return self._profile.seconds(lane, demand)
