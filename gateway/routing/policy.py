"""Which lane a model's requests should go to: rent or buy.

No clock, no sockets, no tasks: time and demand come in, the lane comes out. Staying on
the slower lane costs rent, the request-seconds lost against the other one. Moving costs
a price. The policy moves when the rent has reached the price (Borodin, Linial and Saks,
J. ACM 39, 1992), so that how long it hesitates follows from what a move costs, and
nobody has to guess a threshold or a dwell time.

What a move costs depends on the placement. Where both lanes are resident it delays only
those it overlaps with (`Overlap`). Where one GPU has to be handed over it delays
everybody, and what that costs is learned from the moves that were made (`HandOver`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.routing.profile import Profile

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

#: How many round trips staying must have cost before a move pays. Half of one is what
#: theory asks for; demand is lower on the faster lane just because it is faster, so what
#: the slower would lose is underrated. Chosen in simulation, over seeds.
TRIPS = 1.5
#: No hand-over is reckoned quicker than this, seconds: what it disturbs besides (prompt
#: caches, streams held back) is not in its cost. Chosen in simulation, over seeds.
QUICKEST_S = 15.0
#: The demand at which it is looked whether one lane is always better.
MATTERS = range(1, 33)
#: How much the newest hand-over counts in what one costs, once there were a few.
NEWEST = 0.25
#: How far the bar may grow after hand-overs that did not pay.
WARIEST = 16.0
#: For how long the past tells where demand is at home, and for how long a move counts.
HOUR_S = 3600.0

#: Request-seconds that are none: so far may floating-point sums be off, after which
#: what is due at a moment must still happen at that moment.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True, slots=True)
class Served:
    """A model as the policy knows it: the lanes it has, and what is known of them."""

    lanes: tuple[str, ...]
    profile: Profile


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of one model at a moment.

    Attributes:
        n: Foreground requests that run or wait, stranded ones included.
        running: Of all requests, how many run on each lane.
        stranded: Foreground requests that wait for a lane that does not hold the GPU
            and that no other lane can serve now, by lane. Always empty if shared.
    """

    n: int
    running: Mapping[str, int]
    stranded: Mapping[str, int]


class Overlap:
    """The price of a move where both lanes are resident: a shared placement.

    It delays nobody but those it overlaps with, so its price is that of the requests
    still running on the lane it leaves. With none of them it is near zero: a part of one
    request's time, which one person alone has paid after one. When nobody has been there
    for a while it is zero: the faster lane at this demand.
    """

    def __init__(self) -> None:
        self._busy_at = -math.inf  # when somebody was last there
        self._forgotten = True

    def passed(self, now: float, demand: int) -> None:
        """Until now so many requests were there."""
        if demand:
            self._busy_at = now
        self._forgotten = now - self._busy_at > FORGOTTEN_S

    def bar(self, alone_s: float | None, here_s: float | None, running: int) -> float:
        """Request-seconds that leaving costs, by what a request takes there."""
        if alone_s is None or here_s is None:
            return 0.0
        least = 0.0 if self._forgotten else LEAST * alone_s
        return max(least, OVERLAP * here_s * running)


class HandOver:
    """The price of a move where one GPU is handed over: an exclusive placement.

    Args:
        assumed_s: Seconds a hand-over takes, until one was seen.
        moves_per_hour: How many moves for the sake of speed any hour may have.
        patience_s: How long a request waits for the engine that does not hold the GPU,
            where no other can serve it, before the GPU is moved for it.

    A move costs the request-seconds that people waited because of it; what it will cost
    is the mean of those before, each direction for itself. The bar is one and a half round
    trips, times how wary the moves to that lane have made us: twice as wary after a stay that
    did not earn its round trip or a move that failed, half as wary after one that did.
    """

    def __init__(
        self, assumed_s: float = 12.0, moves_per_hour: int = 2, patience_s: float = 30.0
    ) -> None:
        self.assumed_s = assumed_s
        self.moves_per_hour = moves_per_hour
        self.patience_s = patience_s
        self.waited_s = 0.0  # request-seconds, by all that ever waited
        self._seen: dict[tuple[str, str], _Moves] = {}
        self._wary: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._not_before = -math.inf  # after a failure nothing is tried for a while
        self._counted: deque[float] = deque(maxlen=max(1, 2 * moves_per_hour))
        # The recent past, fading: seconds with demand, their request-seconds, and those
        # that each lane would have lost against the one that was there.
        self._busy_s = 0.0
        self._demand_s = 0.0
        self._lost: dict[str, float] = {}
        # This stay, and the move that is under way.
        self._held_at = -math.inf
        self._former: str | None = None  # None: it did not come here for the sake of speed
        self._way_back: str | None = None  # where a forced move came from: no limit for that
        self._earned = 0.0
        self._began_at = 0.0
        self._waited_before = 0.0

    # What passes

    def passed(self, seconds: float, demand: int, lane: str, rents: Mapping[str, float]) -> None:
        """So long there was this demand, and the others would have saved this a second."""
        fade = math.exp(-seconds / HOUR_S)
        self._busy_s *= fade
        self._demand_s *= fade
        if demand:
            self._busy_s += seconds
            self._demand_s += seconds * demand
        if lane not in self._lost:
            self._lost[lane] = 0.0
        for name in self._lost:
            self._lost[name] *= fade
        for there, rent in rents.items():
            self._lost[there] = self._lost.get(there, 0.0) - rent * seconds
        if self._former is not None:
            self._earned -= rents.get(self._former, 0.0) * seconds

    def waited(self, seconds: float, requests: int) -> None:
        """So long so many waited for a lane to hold the GPU."""
        self.waited_s += seconds * requests

    # Moves

    def began(self, now: float) -> None:
        """A hand-over begins."""
        self._began_at = now
        self._waited_before = self.waited_s

    def ended(self, now: float, here: str, there: str, *, forced: bool) -> None:
        """The hand-over from here to there has succeeded; `forced` if not for speed."""
        self._learn((here, there), now - self._began_at)
        if self._former is not None and not forced:
            trip = self._cost(self._former, here, 0.0) + self._cost(here, self._former, 0.0)
            self._judge(here, earned=self._earned >= trip)
        if forced:
            if self._way_back is None:
                self._way_back = here
        else:
            if there != self._way_back:
                self._counted.append(self._began_at)
            self._way_back = None
        self._former = None if forced else here
        self._earned = 0.0
        self._held_at = now
        self._failures.pop(there, None)

    def failed(self, now: float, there: str) -> None:
        """The hand-over has failed: wait before the next, twice as long each time."""
        failures = self._failures[there] = self._failures.get(there, 0) + 1
        self._judge(there, earned=False)
        took = max(self.assumed_s, now - self._began_at)
        self._not_before = now + took * min(WARIEST, 2.0 ** (failures - 1))

    def adopted(self, now: float) -> None:
        """A lane was found to hold the GPU."""
        self._held_at = now
        self._former = self._way_back = None
        self._earned = 0.0

    def _learn(self, way: tuple[str, str], took_s: float) -> None:
        seen = self._seen.setdefault(way, _Moves())
        seen.number += 1
        weight = max(1 / seen.number, NEWEST)
        seen.cost += (self.waited_s - self._waited_before - seen.cost) * weight
        seen.seconds += (took_s - seen.seconds) * weight

    def _judge(self, lane: str, *, earned: bool) -> None:
        wary = self._wary.get(lane, 1.0)
        self._wary[lane] = max(1.0, wary / 2) if earned else min(WARIEST, wary * 2)

    # What it costs, and when it may be

    def bar(self, here: str, there: str, demand: int, *, for_good: bool) -> float:
        """Request-seconds that staying here must have lost before a move to there pays.

        `for_good`: it is better there at any demand, so nobody will want to come back.
        """
        least = QUICKEST_S * self._mean(demand)
        ways = [(here, there)] if for_good else [(here, there), (there, here)]
        trip = sum(max(least, self._cost(*way, demand)) for way in ways)
        return self._wary.get(there, 1.0) * (trip if for_good else TRIPS * trip)

    def allowed_at(self, here: str, there: str, now: float, rent: float) -> float:
        """From when on a move for the sake of speed may be made, if nothing changes.

        Of the moves that two hours may have, leaving the lane where demand is at home
        needs two to be left, so that the way back can be gone at any time; going home
        needs one.
        """
        if there == self._way_back:
            return self._not_before
        if self.moves_per_hour < 1:
            return math.inf
        home_at = self._home_at(here, there, now, rent)
        return max(self._not_before, min(self._free_at(2), max(self._free_at(1), home_at)))

    def _free_at(self, moves: int) -> float:
        """From when on so many moves are left of those that two hours may have."""
        over = len(self._counted) + moves - 2 * self.moves_per_hour
        return self._counted[over - 1] + 2 * HOUR_S if over > 0 else -math.inf

    def forced_at(self, since: float, here: str, there: str) -> float:
        """From when on a move is made for those who wait for it since then."""
        held = self._held_at + self.takes_s(here, there)
        return max(self._not_before, held, since + self.patience_s)

    @property
    def not_before(self) -> float:
        """Until when nothing is tried, after a move that failed."""
        return self._not_before

    def takes_s(self, here: str, there: str) -> float:
        """Seconds a hand-over takes: as seen, else as the way back was, else assumed."""
        seen = self._seen.get((here, there)) or self._seen.get((there, here))
        return seen.seconds if seen else self.assumed_s

    def _cost(self, here: str, there: str, demand: float) -> float:
        if seen := self._seen.get((here, there)):
            return seen.cost
        return self.takes_s(here, there) * self._mean(demand)

    def _mean(self, demand: float) -> float:
        """Mean demand of the recent past, where there was any; at least one."""
        return max(1.0, self._demand_s / self._busy_s if self._busy_s else demand)

    def _home_at(self, here: str, there: str, now: float, rent: float) -> float:
        """From when on the recent past will have been cheaper over there."""
        saved = self._lost.get(here, 0.0) - self._lost.get(there, 0.0)
        if saved > -NEGLIGIBLE:
            return -math.inf
        if rent <= 0:
            return math.inf
        # saved(t) = saved * f + rent * HOUR_S * (1 - f), where f = exp(-t / HOUR_S)
        gain = rent * HOUR_S
        return now + HOUR_S * math.log((gain - saved) / gain)


@dataclass(slots=True)
class _Moves:
    """The moves in one direction: how many, and the mean request-seconds and seconds of one."""

    number: int = 0
    cost: float = 0.0
    seconds: float = 0.0


class _Model:
    """One model's demand, and the rent of it by whole numbers of requests."""

    __slots__ = ("_pairs", "_rents", "either", "lanes", "n", "profile", "running", "stranded")

    def __init__(self, lanes: Sequence[str], served: Served) -> None:
        self.lanes = tuple(lane for lane in lanes if lane in served.lanes)
        self._pairs = [(here, there) for here in lanes for there in lanes if here != there]
        self.know(served.profile)
        self.n = 0
        self.either = 0  # of them, those that are not stranded
        self.running: Mapping[str, int] = {}
        self.stranded: Mapping[str, int] = {}

    def know(self, profile: Profile) -> None:
        self.profile = profile
        self._rents: dict[tuple[str, str], list[float]] = {pair: [0.0] for pair in self._pairs}

    def see(self, demand: Demand) -> None:
        self.n = demand.n
        self.running = demand.running
        self.stranded = demand.stranded
        self.either = demand.n
        if demand.stranded:
            self.either = max(0, demand.n - sum(demand.stranded.values()))

    def rent_at(self, here: str, there: str, n: int) -> float:
        """Request-seconds lost a second at this demand, less those that would be lost there."""
        table = self._rents[here, there]
        if n >= len(table):
            table.extend(self._rent(here, there, more) for more in range(len(table), 2 * n + 1))
        return table[n]

    def rent(self, here: str, there: str) -> float:
        """The same at the demand of now, with those who wait for one of the two alone."""
        rent = self.rent_at(here, there, self.either)
        if self.stranded:
            rent += self.stranded.get(there, 0) - self.stranded.get(here, 0)
        return rent

    def _rent(self, here: str, there: str, n: int) -> float:
        if here not in self.lanes:
            return float(n) if there in self.lanes else 0.0
        if there not in self.lanes:
            return -float(n)
        here_s, there_s = self.seconds(here, n), self.seconds(there, n)
        if here_s is None or there_s is None:
            return 0.0  # not measured: nothing to move for, nothing to stay for
        best = min(here_s, there_s)
        return n * (best / there_s - best / here_s)

    def seconds(self, lane: str, n: int) -> float | None:
        return self.profile.seconds(lane, n) if lane in self.lanes else None


class Policy:
    """The lane chosen by demand: of one model in a shared placement, of a GPU otherwise.

    Args:
        lanes: The lanes' names, the one to begin with first.
        models: By name, all whose requests follow this policy.
        price: What a move costs here; `HandOver` makes the placement exclusive.

    Attributes:
        lane: Where requests should go; while moving, the lane that will hold the GPU.
        regret: Request-seconds lost by staying, net, since the last move.
        moves: How often it has moved.
        moving: In an exclusive placement, from a decision until `settled`.
        pin: The operator's lane, in an exclusive placement (in a shared one it is the
            scheduler's): gone to at the next `observe`, and stayed on.
    """

    def __init__(
        self, lanes: Sequence[str], models: Mapping[str, Served], price: Overlap | HandOver
    ) -> None:
        self.lane = lanes[0]
        self.regret = 0.0
        self.moves = 0
        self.moving = False
        self.pin: str | None = None
        self._lanes = tuple(lanes)
        self._models = {name: _Model(lanes, served) for name, served in models.items()}
        self._for_good = self._always_better()
        self._overlap = price if isinstance(price, Overlap) else None
        self._hand_over = price if isinstance(price, HandOver) else None
        self._at = 0.0
        self._demand = 0
        self._running = 0
        self._rent = 0.0  # against the best other lane
        self._rents = dict.fromkeys(lanes[1:], 0.0)
        self._best = lanes[1] if len(lanes) > 1 else lanes[0]
        self._since: dict[str, float] = {}  # by lane, since when somebody is stranded
        self._free = False  # no lane holds, in an exclusive placement
        self._left = self.lane  # by the move under way
        self._forced = False  # so is that move: not for the sake of speed
        self._why = ""

    def __repr__(self) -> str:
        moving = "to " if self.moving else ""
        return (
            f"<Policy {moving}{self.lane}, regret {self.regret:.1f} of {self.price:.1f}, "
            f"{self.moves} moves>"
        )

    @property
    def price(self) -> float:
        """What leaving this lane costs now, request-seconds."""
        if self._hand_over is not None:
            for_good = (self.lane, self._best) in self._for_good
            return self._hand_over.bar(self.lane, self._best, self._demand, for_good=for_good)
        assert self._overlap is not None  # noqa: S101 - one of the two
        model = next(iter(self._models.values()))
        return self._overlap.bar(
            model.seconds(self.lane, 1),
            model.seconds(self.lane, model.n),
            model.running.get(self.lane, 0),
        )

    @property
    def why(self) -> str:
        """What the last move, or the one under way, was made for."""
        return self._why

    @property
    def waited(self) -> float:
        """Request-seconds that people have waited for the GPU, in all."""
        return self._hand_over.waited_s if self._hand_over is not None else 0.0

    def reason(self, model: str) -> str:
        """Why this lane, in words and numbers for the `X-Gateway-Reason` header."""
        if self.moving:
            return self._why
        if self.pin == self.lane:
            return "pinned by the operator"
        seen = self._models[model]
        if len(seen.lanes) == 1:
            return "the model's only lane"
        return self._compared(seen)

    def _compared(self, seen: _Model) -> str:
        n = max(1, seen.n)
        here_s = seen.seconds(self.lane, n)
        others = [
            (seconds, name)
            for name in self._lanes
            if name != self.lane and (seconds := seen.seconds(name, n)) is not None
        ]
        if here_s is None or not others:
            return "not measured"
        there_s, name = min(others)
        if here_s <= there_s:
            return (
                f"faster at demand {n} by the {seen.profile.source} profile: "
                f"{here_s:.1f} s against {there_s:.1f} s on {name}"
            )
        if len(self._models) > 1 and self._rent <= 0:
            return f"{self.lane} has the GPU for what else is asked: {there_s:.1f} s on {name}"
        owed = f"regret {self.regret:.1f} of {self.price:.1f} request-seconds at demand {n}"
        if self._hand_over is not None and self.regret >= self.price - NEGLIGIBLE:
            until = self._allowed_at(self._hand_over) - self._at
            return f"the next move to {self._best} may be in {max(0.0, until):.0f} s: {owed}"
        return f"a move to {name} does not pay yet: {owed}"

    def observe(self, now: float, model: str, demand: Demand) -> bool:
        """Take the state of this moment; True when the lane has just changed.

        In an exclusive placement that is the moment to begin a hand-over to `lane`, and
        to call `settled` when it is over.

        Args:
            now: Seconds on any steady clock.
            model: Whose demand it is; that of the others is as they said last.
            demand: What is asked of it now.
        """
        seen = self._models[model]
        if len(self._lanes) == 1:
            seen.see(demand)
            return False
        self._pass(now)
        self._demand += demand.n - seen.n
        self._running += sum(demand.running.values()) - sum(seen.running.values())
        seen.see(demand)
        self._weigh()
        if self._hand_over is None:
            return self._shared()
        if demand.stranded or self._since:
            self._note_stranded(now)
        if self._free:
            self._turn_to_the_faster()
            return False
        return not self.moving and self._exclusive(now, self._hand_over)

    def _turn_to_the_faster(self) -> None:
        if self._rent > 0:
            self.lane = self._best
            self._weigh()

    def refine(self, now: float, model: str, profile: Profile) -> None:
        """A model's requests are now known to take so long; what was lost before stays so."""
        several = len(self._lanes) > 1
        if several:
            self._pass(now)
        self._models[model].know(profile)
        if several:
            self._for_good = self._always_better()
            self._weigh()

    def settled(self, now: float, lane: str) -> None:
        """The hand-over is over and this lane holds the GPU, whichever was wanted.

        Without a hand-over under way it is the lane that was found to hold the GPU.
        """
        assert self._hand_over is not None  # noqa: S101 - a shared placement has none
        self._pass(now)
        if not self.moving:
            self._hand_over.adopted(now)
        elif lane == self.lane:
            self._hand_over.ended(now, self._left, lane, forced=self._forced)
        else:
            self._hand_over.failed(now, self.lane)
        self.moving = self._free = False
        self.lane = lane
        self.regret = 0.0
        self._since.pop(lane, None)
        self._weigh()

    def freed(self, now: float) -> None:
        """No lane holds the GPU: whichever is next, a move costs nothing until `settled`."""
        self._pass(now)
        self.moving = False
        self.regret = 0.0
        self._free = True

    def due(self) -> float:
        """The moment at which it will move if nothing changes before; inf if never."""
        if self._hand_over is None:
            if self._rent <= 0:
                return math.inf
            return self._at + (self.price - self.regret) / self._rent
        if self.moving or self._free:
            return math.inf
        if self.pin is not None:
            wanted = self.pin != self.lane
            return max(self._at, self._hand_over.not_before) if wanted else math.inf
        due = math.inf
        if self._rent > 0:
            paid = self._at + max(0.0, self.price - self.regret) / self._rent
            due = max(paid, self._allowed_at(self._hand_over))
        if self._since:
            due = min(due, self._patient_until(self._hand_over)[0])
        return due

    # Time passes

    def _pass(self, now: float) -> None:
        passed = now - self._at
        self._at = now
        if self._overlap is not None:
            self._overlap.passed(now, self._demand)
            self.regret = max(0.0, self.regret + self._rent * passed)
        elif self._hand_over is not None and passed > 0:
            if self.moving or self._free:
                self._hand_over.waited(passed, max(0, self._demand - self._running))
                return
            self._hand_over.passed(passed, self._demand, self.lane, self._rents)
            # What was lost while no move was allowed must not be held against a later hour.
            self.regret = min(self.price, max(0.0, self.regret + self._rent * passed))

    def _weigh(self) -> None:
        """What is lost a second, against each of the other lanes."""
        rents: dict[str, float] = {}
        here = self.lane
        best = -math.inf
        for there in self._lanes:
            if there == here:
                continue
            rent = 0.0
            for model in self._models.values():
                rent += model.rent(here, there)
            rents[there] = rent
            if rent > best:
                best, self._best = rent, there
        self._rents = rents
        self._rent = best

    def _note_stranded(self, now: float) -> None:
        stranded = {
            lane
            for model in self._models.values()
            for lane, requests in model.stranded.items()
            if requests and lane != self.lane
        }
        for lane in self._since.keys() - stranded:
            del self._since[lane]
        for lane in stranded:
            self._since.setdefault(lane, now)

    def _always_better(self) -> set[tuple[str, str]]:
        """From where to where a move is for good: better there at any demand that matters."""
        return {
            (here, there)
            for here in self._lanes
            for there in self._lanes
            if here != there
            and all(
                model.rent_at(here, there, n) > 0
                for model in self._models.values()
                for n in MATTERS
            )
        }

    # Deciding

    def _shared(self) -> bool:
        if self._demand == 0 or self._rent <= 0 or self.regret < self.price - NEGLIGIBLE:
            return False
        self.lane = self._best
        self.regret = 0.0
        self.moves += 1
        self._weigh()
        return True

    def _exclusive(self, now: float, price: HandOver) -> bool:
        if self.pin is not None:
            if self.pin == self.lane or now < price.not_before:
                return False
            return self._move(now, price, self.pin, "the operator has pinned it", forced=True)
        if self._rent > 0:
            paid = self.regret >= self.price - NEGLIGIBLE
            if paid and now >= self._allowed_at(price) - NEGLIGIBLE:
                why = f"regret {self.regret:.1f} of {self.price:.1f} request-seconds"
                return self._move(now, price, self._best, why, forced=False)
        if self._since:
            due, lane = self._patient_until(price)
            if now >= due:
                why = "requests that only it can serve have waited long enough"
                return self._move(now, price, lane, why, forced=True)
        return False

    def _move(self, now: float, price: HandOver, lane: str, why: str, *, forced: bool) -> bool:
        price.began(now)
        self._why = f"the GPU goes from {self.lane} to {lane}: {why}"
        self._left = self.lane
        self._forced = forced
        self.lane = lane
        self.moving = True
        self.regret = 0.0
        self.moves += 1
        self._since.pop(lane, None)
        self._weigh()
        return True

    def _allowed_at(self, price: HandOver) -> float:
        return price.allowed_at(self.lane, self._best, self._at, self._rent)

    def _patient_until(self, price: HandOver) -> tuple[float, str]:
        return min(
            (price.forced_at(since, self.lane, lane), lane) for lane, since in self._since.items()
        )
