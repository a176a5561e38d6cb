"""One GPU and two engines on a virtual clock: who waits how long, by which lane holds.

Event driven and without a real clock: a day takes about a second. Each lane serves by its
profile. With `n` requests there, of which at most its slots run, the lane as a whole
answers `n / seconds(n)` a second, shared evenly by those that run, and the rest wait in
order: so a crowd that keeps `n` there sees exactly the measured seconds. A hand-over
lets what runs on the former lane end, then everybody waits for so many seconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from gateway.routing.profile import Profile

#: The least that is between two looks at a decision that is due.
TICK_S = 1e-3


class Decider(Protocol):
    """Chooses the lane, as `gateway.routing.policy.Policy` does."""

    @property
    def lane(self) -> str:
        """Where requests should go."""

    def observe(self, now: float, demand: int, running: Mapping[str, int]) -> bool:
        """True when the lane has just changed, which begins a hand-over."""

    def settled(self, now: float, lane: str) -> None:
        """The hand-over is over and this lane holds."""

    def due(self) -> float:
        """When to look again if nothing happens."""


class Demand(Protocol):
    """Requests as they come; a crowd asks again after it was answered."""

    @property
    def next(self) -> float:
        """When `take` is due; inf once nobody comes any more."""

    def take(self, now: float) -> tuple[int, float] | None:
        """Who asks now, and for how much work (1 on average); None where nobody does."""

    def answered(self, now: float, who: int) -> None:
        """Their request is over."""

    def held(self, now: float, lane: str) -> None:
        """From now on this lane holds, for a crowd that minds."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What serves.

    Attributes:
        profile: Seconds a request on each lane, as they really are here.
        slots: How many requests each lane answers at once.
        hand_over_s: Seconds from the end of the drain until the other lane can start.
    """

    profile: Profile
    slots: Mapping[str, int]
    hand_over_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went.

    Attributes:
        seconds: Of each request, from its coming to its answer, in the order of answers.
        moved_at: When each hand-over began.
        held_s: Seconds each lane held the GPU.
        load: Mean number of requests there in each slice of time.
    """

    seconds: list[float]
    moved_at: list[float]
    held_s: dict[str, float]
    load: list[float]

    @property
    def mean_s(self) -> float:
        """Mean seconds a request; 0 where there was none."""
        return math.fsum(self.seconds) / len(self.seconds) if self.seconds else 0.0

    @property
    def p95_s(self) -> float:
        """What 95 of 100 requests stayed below."""
        if not self.seconds:
            return 0.0
        return sorted(self.seconds)[math.ceil(0.95 * len(self.seconds)) - 1]


def run(machine: Machine, demand: Demand, decider: Decider, slice_s: float = 10.0) -> Outcome:
    """Let this demand pass through the machine, as the decider decides."""
    return _Run(machine, demand, decider, slice_s).go()


class _Run:
    """Time is `now`; work is counted in `_done`, which every running request gains alike."""

    def __init__(self, machine: Machine, demand: Demand, decider: Decider, slice_s: float) -> None:
        self._machine = machine
        self._demand = demand
        self._decider = decider
        self._slice_s = slice_s
        self._paces: dict[str, list[float]] = {lane: [0.0] for lane in machine.slots}
        self._holder = decider.lane
        self._moving = False
        self._ready_at = math.inf
        self._due = math.inf
        self._now = 0.0
        self._done = 0.0  # what a request that ran from the beginning would have got
        self._pace = 0.0  # how fast that grows
        self._running: list[tuple[float, int, float]] = []  # (ends at this `_done`, who, came at)
        self._waiting: deque[tuple[float, int, float]] = deque()  # (work, who, came at)
        self._held_since = 0.0
        self._seconds: list[float] = []
        self._moved_at: list[float] = []
        self._held_s = dict.fromkeys(machine.slots, 0.0)
        self._load: list[float] = []

    def go(self) -> Outcome:
        demand = self._demand
        demand.held(0.0, self._holder)
        while True:
            running = self._running
            ends = math.inf
            if running:
                ends = self._now + max(0.0, running[0][0] - self._done) / self._pace
            comes = demand.next
            if comes == math.inf and not running and not self._waiting:
                break
            at = min(ends, comes, self._ready_at, self._due)
            if at == math.inf:
                break
            self._pass(at)
            if at == ends:
                self._end(at)
            elif at == self._ready_at:
                self._settle(at)
            elif at == comes:
                asked = demand.take(at)
                if asked is None:
                    continue
                self._waiting.append((asked[1], asked[0], at))
            self._decide(at)
        self._held_s[self._holder] += self._now - self._held_since
        load = [spent / self._slice_s for spent in self._load]
        return Outcome(self._seconds, self._moved_at, self._held_s, load)

    def _pass(self, now: float) -> None:
        passed = now - self._now
        if passed > 0:
            there = len(self._running) + len(self._waiting)
            if there:
                self._done += passed * self._pace
                slot = int(self._now / self._slice_s)
                load = self._load
                while len(load) <= slot:
                    load.append(0.0)
                load[slot] += there * passed
            self._now = now

    def _end(self, now: float) -> None:
        _, who, came = heappop(self._running)
        self._seconds.append(now - came)
        self._demand.answered(now, who)
        if self._moving and not self._running:
            self._ready_at = now + self._machine.hand_over_s

    def _settle(self, now: float) -> None:
        self._held_s[self._holder] += now - self._held_since
        self._held_since = now
        self._holder = self._decider.lane
        self._moving = False
        self._ready_at = math.inf
        self._decider.settled(now, self._holder)
        self._demand.held(now, self._holder)

    def _decide(self, now: float) -> None:
        running, waiting = self._running, self._waiting
        decider, holder = self._decider, self._holder
        changed = decider.observe(now, len(running) + len(waiting), {holder: len(running)})
        if changed and not self._moving:
            self._moving = True
            self._moved_at.append(now)
            if not running:
                self._ready_at = now + self._machine.hand_over_s
        if self._moving:
            self._due = math.inf
            self._pace = self._pace_at(len(running))
            return
        free = self._machine.slots[holder] - len(running)
        while waiting and free > 0:
            work, who, came = waiting.popleft()
            heappush(running, (self._done + work, who, came))
            free -= 1
        self._pace = self._pace_at(len(running) + len(waiting))
        self._due = max(decider.due(), now + TICK_S)

    def _pace_at(self, there: int) -> float:
        """Requests' worth a second that each running one gets, with so many there."""
        paces = self._paces[self._holder]
        while len(paces) <= there:
            number = len(paces)
            seconds = self._machine.profile.seconds(self._holder, number)
            assert seconds is not None  # noqa: S101 - only measured lanes take part
            paces.append(number / (min(number, self._machine.slots[self._holder]) * seconds))
        return paces[there]
