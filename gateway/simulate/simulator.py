"""One GPU and two engines on a virtual clock: what each request takes under a policy.

Driven by events, without a real clock: a day takes about a second. With `n` requests present, the
lane that holds the GPU answers `n / seconds(n)` requests per second, by the profile. Requests in
its slots share that evenly; the others wait in order. So a constant load of `n` takes exactly the
profile's seconds. A hand-over lets running requests end; then all requests wait until it is over.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from gateway.routing.profile import Profile

#: The shortest time between two decisions, seconds.
TICK_S = 1e-3


class SimulatedPolicy(Protocol):
    """Chooses the lane that holds the GPU, as the gateway's policy does."""

    @property
    def lane(self) -> str:
        """The lane that should hold the GPU."""

    def observe(self, now: float, demand: int, running: Mapping[str, int]) -> bool:
        """Take note of the demand. True when `lane` has just changed: a hand-over begins."""

    def settled(self, now: float, lane: str) -> None:
        """Take note that the hand-over is over, and that this lane holds the GPU."""

    def due(self) -> float:
        """When `observe` must be called again although nothing happens; inf: never."""


class Workload(Protocol):
    """Requests in the order of their arrival."""

    @property
    def next_at(self) -> float:
        """When `take` must be called; inf once no request will arrive any more."""

    def take(self, now: float) -> tuple[int, float] | None:
        """The person who asks now, and the work of the request (mean 1); None for no request."""

    def on_answer(self, now: float, person: int) -> None:
        """Take note that this person's request is answered."""

    def on_holder(self, now: float, lane: str) -> None:
        """Take note that this lane holds the GPU from now on."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What is simulated.

    Attributes:
        profile: The true seconds per request on each lane.
        slots: Concurrent requests that each lane answers.
        hand_over_s: Seconds from the end of the drain until the other lane can start.
    """

    profile: Profile
    slots: Mapping[str, int]
    hand_over_s: float


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What a simulated day was like.

    Attributes:
        seconds: Of each request, from its arrival to its answer, in the order of the answers.
        moved_at: When each hand-over began.
        held_s: By lane, the seconds that it held the GPU.
        load: Mean number of requests present in each slice of time.
    """

    seconds: list[float]
    moved_at: list[float]
    held_s: dict[str, float]
    load: list[float]

    @property
    def mean_s(self) -> float:
        """Mean seconds per request; 0 without requests."""
        return math.fsum(self.seconds) / len(self.seconds) if self.seconds else 0.0

    @property
    def p95_s(self) -> float:
        """95th percentile of the seconds per request; 0 without requests."""
        if not self.seconds:
            return 0.0
        return sorted(self.seconds)[math.ceil(0.95 * len(self.seconds)) - 1]


def simulate(
    machine: Machine, workload: Workload, policy: SimulatedPolicy, slice_s: float = 10.0
) -> SimulationResult:
    """Let a machine answer this workload, with the GPU moved as the policy decides.

    Args:
        machine: What is simulated.
        workload: The requests.
        policy: Chooses the lane that holds the GPU.
        slice_s: Length of a slice of `SimulationResult.load`, seconds.
    """
    return _Simulation(machine, workload, policy, slice_s).run()


class _Simulation:
    """The state of a simulation. Every running request gains the same work per second."""

    def __init__(
        self, machine: Machine, workload: Workload, policy: SimulatedPolicy, slice_s: float
    ) -> None:
        self._machine = machine
        self._workload = workload
        self._policy = policy
        self._slice_s = slice_s
        self._paces: dict[str, list[float]] = {lane: [0.0] for lane in machine.slots}
        self._holder = policy.lane
        self._moving = False
        self._ready_at = math.inf
        self._due = math.inf
        self._now = 0.0
        self._progress = 0.0  # the work of a request that has run since the beginning
        self._pace = 0.0  # work per second of each running request
        self._running: list[tuple[float, int, float]] = []  # (progress at its end, who, arrival)
        self._waiting: deque[tuple[float, int, float]] = deque()  # (work, who, arrival)
        self._held_since = 0.0
        self._seconds: list[float] = []
        self._moved_at: list[float] = []
        self._held_s = dict.fromkeys(machine.slots, 0.0)
        self._load: list[float] = []

    def run(self) -> SimulationResult:
        workload = self._workload
        workload.on_holder(0.0, self._holder)
        while True:
            running = self._running
            end = math.inf
            if running:
                end = self._now + max(0.0, running[0][0] - self._progress) / self._pace
            arrival = workload.next_at
            if arrival == math.inf and not running and not self._waiting:
                break
            at = min(end, arrival, self._ready_at, self._due)
            if at == math.inf:
                break
            self._advance(at)
            if at == end:
                self._answer(at)
            elif at == self._ready_at:
                self._finish_hand_over(at)
            elif at == arrival:
                request = workload.take(at)
                if request is None:
                    continue
                self._waiting.append((request[1], request[0], at))
            self._decide(at)
        self._held_s[self._holder] += self._now - self._held_since
        load = [spent / self._slice_s for spent in self._load]
        return SimulationResult(self._seconds, self._moved_at, self._held_s, load)

    def _advance(self, now: float) -> None:
        passed = now - self._now
        if passed > 0:
            present = len(self._running) + len(self._waiting)
            if present:
                self._progress += passed * self._pace
                number = int(self._now / self._slice_s)
                load = self._load
                while len(load) <= number:
                    load.append(0.0)
                load[number] += present * passed
            self._now = now

    def _answer(self, now: float) -> None:
        _, person, arrived = heappop(self._running)
        self._seconds.append(now - arrived)
        self._workload.on_answer(now, person)
        if self._moving and not self._running:
            self._ready_at = now + self._machine.hand_over_s

    def _finish_hand_over(self, now: float) -> None:
        self._held_s[self._holder] += now - self._held_since
        self._held_since = now
        self._holder = self._policy.lane
        self._moving = False
        self._ready_at = math.inf
        self._policy.settled(now, self._holder)
        self._workload.on_holder(now, self._holder)

    def _decide(self, now: float) -> None:
        running, waiting = self._running, self._waiting
        policy, holder = self._policy, self._holder
        changed = policy.observe(now, len(running) + len(waiting), {holder: len(running)})
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
            work, person, arrived = waiting.popleft()
            heappush(running, (self._progress + work, person, arrived))
            free -= 1
        self._pace = self._pace_at(len(running) + len(waiting))
        self._due = max(policy.due(), now + TICK_S)

    def _pace_at(self, present: int) -> float:
        """Work per second of each running request, with so many requests present."""
        paces = self._paces[self._holder]
        while len(paces) <= present:
            number = len(paces)
            seconds = self._machine.profile.seconds(self._holder, number)
            assert seconds is not None  # noqa: S101 - only lanes of the profile take part
            paces.append(number / (min(number, self._machine.slots[self._holder]) * seconds))
        return paces[present]
