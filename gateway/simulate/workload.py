"""The requests of a trace, one after the other, as the simulator takes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from random import Random

from gateway.simulate.traces import PeopleTrace, RequestTrace, Trace


def workload_of(trace: Trace, think_s: float, seed: int) -> ClosedLoop | OpenLoop:
    """The requests of this trace from its beginning.

    Args:
        trace: A number of people, or requests at given times.
        think_s: Mean seconds between an answer and the next question.
        seed: The same seed gives the same people.
    """
    if isinstance(trace, PeopleTrace):
        return ClosedLoop(trace, think_s, seed)
    return OpenLoop(trace)


class ClosedLoop:
    """People who ask, read and think.

    Every person has a random number generator, so all policies meet the same people: their n-th
    pause and their n-th question do not depend on the policy. A person who leaves still receives
    the last answer.
    """

    def __init__(self, trace: PeopleTrace, think_s: float, seed: int) -> None:
        self.next_at = 0.0
        self.steps_taken: list[tuple[float, int]] = []  # as an adversary made them
        self._by_holder = trace.by_holder
        self._steps = [*trace.steps, (trace.ends_s, 0)]
        self._ends_s = trace.ends_s
        self._step = 0
        self._think_s = think_s
        self._seed = seed
        self._present = 0
        self._absent: set[int] = set()
        self._random: list[Callable[[], float]] = []
        self._arrivals: list[tuple[float, int]] = []
        self._schedule()

    def take(self, now: float) -> tuple[int, float] | None:
        """See `Workload.take`."""
        request = None
        if self._step < len(self._steps) and self._steps[self._step][0] <= now:
            people = self._steps[self._step][1]
            self._step += 1
            if not self._by_holder or not people:
                self._set_people(now, people)
        else:
            _, person = heappop(self._arrivals)
            if person < self._present:
                request = person, -math.log(1.0 - self._random[person]())
            else:
                self._absent.add(person)
        self._schedule()
        return request

    def on_answer(self, now: float, person: int) -> None:
        """See `Workload.on_answer`."""
        if person < self._present:
            self._think(now, person)
            self._schedule()
        else:
            self._absent.add(person)

    def on_holder(self, now: float, lane: str) -> None:
        """See `Workload.on_holder`."""
        if self._by_holder and now < self._ends_s:
            self._set_people(now, self._by_holder[lane])
            self._schedule()

    def _set_people(self, now: float, people: int) -> None:
        self.steps_taken.append((now, people))
        while len(self._random) < people:
            person = len(self._random)
            self._absent.add(person)
            self._random.append(Random(f"{self._seed} {person}").random)  # noqa: S311
        self._present = people
        for person in sorted(person for person in self._absent if person < people):
            self._absent.discard(person)
            self._think(now, person)

    def _think(self, now: float, person: int) -> None:
        pause_s = -self._think_s * math.log(1.0 - self._random[person]())
        heappush(self._arrivals, (now + pause_s, person))

    def _schedule(self) -> None:
        arrival = self._arrivals[0][0] if self._arrivals else math.inf
        step = self._steps[self._step][0] if self._step < len(self._steps) else math.inf
        self.next_at = min(arrival, step)


class OpenLoop:
    """Requests at the times of a log, whatever happened to those before."""

    def __init__(self, trace: RequestTrace) -> None:
        self._trace = trace
        self._index = 0
        self.next_at = trace.at[0]

    def take(self, now: float) -> tuple[int, float] | None:
        """See `Workload.take`."""
        index = self._index
        self._index += 1
        times = self._trace.at
        self.next_at = times[self._index] if self._index < len(times) else math.inf
        return index, self._trace.work[index]

    def on_answer(self, now: float, person: int) -> None:
        """Does nothing: no request depends on an answer."""

    def on_holder(self, now: float, lane: str) -> None:
        """Does nothing: no request depends on who holds the GPU."""
