"""Demand over a day: a number of people by the time of day, or requests at given times.

People form a closed loop: they ask, read the answer, think, and ask again, so demand depends on
how fast the answers are. Requests from a log form an open loop: they arrive at the times of the
log, whatever happened to those before.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from gateway.simulate.choices import MAX_PEOPLE
from gateway.simulate.simulator import SimulationResult

#: The load of a replayed log is smoothed over this time, seconds.
SMOOTH_S = 60.0

#: Seconds from the beginning, and the number of people from then on.
Steps: TypeAlias = Sequence[tuple[float, int]]


@dataclass(frozen=True)
class PeopleTrace:
    """How many people are present, in steps.

    Attributes:
        name: Its name in the results.
        steps: Seconds from the beginning, and the number of people from then on.
        ends_s: Seconds until the last one leaves.
        people: The size of the team; of a trace from a file, its largest number.
        by_holder: Only of an adversary: the number of people by the lane that holds the GPU.
    """

    name: str
    steps: Steps
    ends_s: float
    people: int
    by_holder: Mapping[str, int] = field(default_factory=dict)

    def people_at(self, seconds: float) -> int:
        """How many people are present so many seconds from the beginning."""
        index = bisect_left(self.steps, (seconds, MAX_PEOPLE + 1)) - 1
        return self.steps[index][1] if index >= 0 and seconds < self.ends_s else 0

    def mean_load(
        self,
        seconds: Callable[[int], float],
        think_s: float,
        slice_s: float,
        result: SimulationResult,
    ) -> list[float]:
        """Mean number of requests in each slice of time, if one lane serves all day.

        It is known exactly: see `equilibrium`.

        Args:
            seconds: What a request takes on that lane, by the number of concurrent requests.
            think_s: Mean seconds between an answer and the next question.
            slice_s: Length of a slice.
            result: The simulation of that day; only a request trace needs it.
        """
        known: dict[int, float] = {}
        loads: list[float] = []
        for number in range(math.ceil(self.ends_s / slice_s)):
            people = self.people_at((number + 0.5) * slice_s)
            if people not in known:
                known[people] = equilibrium(people, seconds, think_s)
            loads.append(known[people])
        return loads

    def backlog(self, since: float, until: float, before: float, think_s: float) -> float:
        """Mean number of waiting requests at `until`, if none is answered from `since` on.

        Args:
            since: Seconds from the beginning.
            until: Seconds from the beginning.
            before: How many requests were present at `since`.
            think_s: Mean seconds between an answer and the next question.
        """
        people = self.people_at(until)
        return max(before, people - (people - before) * math.exp((since - until) / think_s))


@dataclass(frozen=True)
class RequestTrace:
    """Requests at given times.

    Attributes:
        name: Its name in the results.
        at: Seconds from the beginning, ascending.
        work: How much work each request is; the mean is 1.
        ends_s: Seconds until after the last request.
        people: 0, as a log does not say how many people sent the requests.
    """

    name: str
    at: Sequence[float]
    work: Sequence[float]
    ends_s: float
    people: int = 0

    def mean_load(
        self,
        seconds: Callable[[int], float],
        think_s: float,
        slice_s: float,
        result: SimulationResult,
    ) -> list[float]:
        """Mean number of requests in each slice of time, if one lane serves all day.

        It is taken from the simulation of that day, and smoothed. The arguments are those of
        `PeopleTrace.mean_load`.
        """
        size = max(1, round(SMOOTH_S / slice_s))
        loads = result.load
        return [
            math.fsum(loads[n - n % size : n - n % size + size]) / size for n in range(len(loads))
        ]

    def backlog(self, since: float, until: float, before: float, think_s: float) -> float:
        """The number of waiting requests at `until`, if none is answered from `since` on.

        The arguments are those of `PeopleTrace.backlog`.
        """
        return before + bisect_left(self.at, until) - bisect_left(self.at, since)


Trace: TypeAlias = PeopleTrace | RequestTrace


def equilibrium(people: int, seconds: Callable[[int], float], think_s: float) -> float:
    """Mean number of people who wait for an answer or receive one, while the others think.

    A birth-death chain in equilibrium: arrivals slow down and answers speed up with the number
    of requests present.

    Args:
        people: How many people there are.
        seconds: What a request takes, by the number of concurrent requests.
        think_s: Mean seconds between an answer and the next question.
    """
    weight = total = 1.0
    mean = 0.0
    for number in range(1, people + 1):
        weight *= (people - number + 1) / think_s * seconds(number) / number
        total += weight
        mean += weight * number
    return mean / total
